"""Generate a source tree of small Python modules, from which the code data set of the miniature study is built.

What a function computes follows from its name and its docstring, so a tiny model can learn to fill in its body. No
function occurs twice in the tree, so those of a held-out file are new.
"""

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

MODULES = 1200
FUNCTIONS = 1, 3  # the fewest and the most in a module
PACKAGES = 20
RATIOS = 0.88, 0.05, 0.07  # of the files: train, selection, report
QUANTITIES = (
    *("width", "height", "depth", "length", "weight", "price", "amount", "total", "limit", "offset", "speed", "time"),
    *("rate", "count", "size", "left", "right", "first", "second", "upper", "lower", "start", "stop"),
)
# operation -> (what a docstring says of the operands a and b, the expression)
OPERATIONS = {
    "sum": ("the {a} plus the {b}", "{a} + {b}"),
    "difference": ("the {a} minus the {b}", "{a} - {b}"),
    "product": ("the {a} times the {b}", "{a} * {b}"),
    "ratio": ("the {a} divided by the {b}", "{a} / {b}"),
    "larger": ("the larger of the {a} and the {b}", "max({a}, {b})"),
    "smaller": ("the smaller of the {a} and the {b}", "min({a}, {b})"),
    "equality": ("whether the {a} equals the {b}", "{a} == {b}"),
}
# what a docstring adds -> the lines of the body
BODIES = {
    "": "    return {value}\n",
    ", rounded": "    result = {value}\n    return round(result)\n",
    ", or the {a} if there is no {b}": "    if {b} is None:\n        return {a}\n    return {value}\n",
}


def build_tree(folder: Path, seed: int) -> None:
    """Write the modules under `folder`. The same seed gives the same bytes."""
    rng = random.Random(f"code {seed}")
    functions = _functions(rng)
    for number in range(MODULES):
        path = folder / f"package_{number % PACKAGES:02d}" / f"module_{number:04d}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = [f'"""Functions of module {number}."""\n', *islice(functions, rng.randint(*FUNCTIONS))]
        path.write_text("\n\n".join(parts), encoding="utf-8")


def _functions(rng: random.Random) -> Iterator[str]:
    """Yield distinct functions as source text, in random order."""
    every = [
        (operation, a, b, addition)
        for operation in OPERATIONS
        for a in QUANTITIES
        for b in QUANTITIES
        for addition in BODIES
        if a != b
    ]
    rng.shuffle(every)
    for operation, a, b, addition in every:
        said, value = (text.format(a=a, b=b) for text in OPERATIONS[operation])
        name = f"{operation}_of_{a}_and_{b}"
        body = BODIES[addition].format(a=a, b=b, value=value)
        yield f'def {name}({a}, {b}):\n    """Return {said}{addition.format(a=a, b=b)}."""\n{body}'
