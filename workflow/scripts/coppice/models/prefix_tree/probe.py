"""Find out whether a model gives the same numbers in a prefix tree as for each text alone.

A model that ignores the mask or the positions raises no error, it only gives other numbers. So a small tree and its
texts run through the model and are compared: the rows are longer than any window of the model, the texts of different
lengths, and their tokens ordinary ones. The comparison is in float32 if the weights allow it, because in half precision
rounding hides a small fault and may look like a large one. If they do not (quantized or distributed weights), the
tolerance follows from how far two plain passes of the model differ.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
import torch

from .. import library_compat
from . import trie as tries
from .architectures import Knowledge

if TYPE_CHECKING:
    from torch import nn

    from .forward import TreeForward

logger = logging.getLogger("coppice.prefix_tree")

LONGEST = 4096  # limits of the model up to this many tokens are probed; beyond it a probe would take minutes
ORDINARY = 64  # different tokens in a probe
STEM, BRANCH, OTHER, BEYOND = 12, 10, 24, 24  # tokens of the shared prefix, of a branch, of another text, past a limit
SHORTEST = 96  # tokens of the longest text, if there is no limit
UNLISTED = 512  # the same, for architectures that are decided by the probe alone

# Relative differences of a state. In float32 rounding makes about 1e-6, and a branch that sees another more than 1e-2.
FLOAT32_TOLERANCE, FLOAT32_MOST = 2e-4, 2e-3
HALF_TOLERANCE, HALF_MOST = 3e-2, 2e-1
# What architectures raise that cannot take a 4D mask, these positions or texts of this length.
ERRORS = (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError, AssertionError)

ROUNDING_FACTOR = 8  # times the difference of two plain passes


@dataclass(frozen=True)
class Verdict:
    """Whether a model may run a prefix tree, and how it must run texts without one.

    Attributes:
        obstacle: why the prefix tree is not exact; "" if it is.
        alone: True if texts of different lengths in one batch change each other's numbers, so that each text must have
            a pass of its own.
        longest_row: the longest row of a prefix tree for which the probe's result holds; None if there is no limit.
    """

    obstacle: str
    alone: bool
    longest_row: int | None = None


def judge(forward: TreeForward, known: Knowledge) -> Verdict:
    """Return the verdict on the model of `forward`, which must be in eval mode."""
    probe = _Probe(forward, known)
    obstacle = known.obstacle or forward.masks.obstacle or probe.unproved
    with torch.no_grad(), torch.autocast(forward.device.type, enabled=False), _in_float32(forward.model) as float32:
        obstacle = obstacle or probe.obstacle(float32)
        if known.listed and not obstacle:  # tests prove that what else is in the pass does not matter to it
            return Verdict("", alone=False)
        alone = known.dynamic or bool(probe.unproved) or not probe.padding_is_exact()
    if alone and not obstacle:  # the rows of a tree are padded too
        obstacle = "texts of different lengths in one batch change each other's numbers"
    # only the tree keeps texts on the two sides of a boundary apart
    alone = alone or bool(obstacle and known.boundary)
    return Verdict(obstacle, alone, longest_row=None if known.listed else probe.row_length)


class _Probe:
    """The texts of a probe, and the comparisons that are made with them.

    Attributes:
        unproved: why no probe can prove that the tree is exact; "" if one can.
        row_length: the length of the row that holds all texts.
    """

    def __init__(self, forward: TreeForward, known: Knowledge) -> None:
        self.forward, self.known = forward, known
        limits = list(known.limits) if not known.listed else [w for w in forward.masks.windows.values() if w]
        limits += [known.boundary] if known.boundary else []
        # a limit on the place in the row also counts if no text can be as long
        reachable = [limit for limit in limits if limit <= LONGEST]
        self.unproved = ""
        if not known.listed and (
            beyond := [one for one in limits if one > LONGEST and one < (known.context or one + 1)]
        ):
            self.unproved = (
                f"its architecture is not one that is known to be exact, and a limit of {min(beyond)} tokens in its "
                f"configuration is too long to probe"
            )
        longest = max([SHORTEST if known.listed else UNLISTED, *(limit + BEYOND for limit in reachable)])
        # the tables of some models have two positions less than their configuration says
        self.length = min(longest, max(4, known.context - 2) if known.context else longest)
        self.tokens = ordinary_tokens(forward.model)
        self.random = random.Random(0)
        row = longest if known.listed else max(longest, min(known.context or longest, LONGEST) + BEYOND)
        self.texts = self._texts(row)
        self.row_length = len(tries.build(self.texts)[0])

    def _texts(self, row: int) -> list[list[int]]:
        """Return texts that form a tree of more than `row` nodes; the first one is changed by `_changed`.

        The first text is as long as the others allow, its branch comes first in the row, and those behind it are short.
        """
        low, *middle, high = self.tokens
        stem = self._some(min(STEM, self.length // 3))
        texts = [[*stem, low, *self._some(self.length - len(stem) - 1)]]
        while sum(map(len, texts)) < row + len(stem) * len(texts):
            texts.append([*stem, middle[len(texts) % len(middle)], *self._some(self.length - len(stem) - 1)])
        texts.append([*stem, high, *self._some(min(BRANCH, self.length - len(stem) - 1))])
        texts.append([high, *self._some(min(OTHER, self.length - 2))])
        return texts

    def _some(self, count: int) -> list[int]:
        return self.random.choices(self.tokens[1:-1], k=count)

    def obstacle(self, float32: bool) -> str:
        """Return what the comparison found against the prefix tree; "" if the tree is exact."""
        try:
            plain = [self.forward.alone(text) for text in self.texts]
            first = self.forward.states(self.texts)
            # only the first branch changes, so the states of the others must stay the same
            changed = [self.texts[0][: len(self.texts[0]) // 2] + self._some(math.ceil(len(self.texts[0]) / 2))]
            second = self.forward.states([*changed, *self.texts[1:]])
            rounding = self._rounding(plain[-1])
        except ERRORS as error:
            logger.info("the model does not accept the attention mask of a prefix tree: %r", error)
            return f"it does not accept the attention mask of a prefix tree ({type(error).__name__})"
        usual, most = (FLOAT32_TOLERANCE, FLOAT32_MOST) if float32 else (HALF_TOLERANCE, HALF_MOST)
        tolerance = min(max(usual, ROUNDING_FACTOR * rounding), most)
        leak = _largest(second[1:], first[1:])
        error = _largest(first, plain)
        logger.info(
            "prefix tree: error %.1e, leak %.1e, rounding %.1e, of %d tokens", error, leak, rounding, len(plain[0])
        )
        if not leak <= tolerance:
            return f"in a prefix tree one branch changes the states of another (by {leak:.0e}, rounding {rounding:.0e})"
        if not error <= tolerance:
            return f"a prefix tree gives other states than each text alone (by {error:.0e}, rounding {rounding:.0e})"
        return ""

    def padding_is_exact(self) -> bool:
        """Return whether texts of different lengths, padded on the right in one batch, get their own states."""
        # texts on the two sides of a boundary never share a pass
        texts = [self.texts[-2 if self.known.boundary else 0], self.texts[-1]]
        longest = max(map(len, texts))
        rows = torch.tensor([text + [text[-1]] * (longest - len(text)) for text in texts], device=self.forward.device)
        try:
            plain = [self.forward.alone(text) for text in texts]
            found = [row[: len(text)] for row, text in zip(self.forward.run(rows), texts, strict=True)]
            rounding = self._rounding(plain[-1])
        except ERRORS as error:
            logger.info("the model does not accept the texts of the probe: %r", error)
            return False
        return _largest(found, plain) <= min(max(FLOAT32_TOLERANCE, ROUNDING_FACTOR * rounding), HALF_TOLERANCE)

    def _rounding(self, plain: torch.Tensor) -> float:
        """Return how far plain passes differ: of the last text alone, and of four such texts with one token more."""
        text = self.texts[-1]
        rows = torch.tensor([[*text, token] for token in self._some(4)], device=self.forward.device)
        return _largest([row[: len(text)] for row in self.forward.run(rows)], [plain] * 4)


def ordinary_tokens(model: nn.Module) -> list[int]:
    """Return ids whose embeddings are about as long as most others, ascending.

    The lowest ids are often control tokens with embeddings of another size, whose states rounding moves far more than
    those of words, and the highest are often never used.
    """
    weight = model.get_input_embeddings().weight
    special = set(_special(library_compat.text_config(model).to_dict()))
    rows = numpy.unique(numpy.linspace(0, weight.shape[0] - 1, 4096).astype(int))
    rows = [int(row) for row in rows if row not in special] or [int(row) for row in rows]
    if weight.is_meta:  # offloaded: take what is in the middle of the vocabulary
        return rows[len(rows) // 3 :][:ORDINARY]
    whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # sharded over several processes
    sizes = whole.detach()[rows].float().norm(dim=-1)
    near = (sizes - sizes.median()).abs().argsort()[: max(4, ORDINARY)]
    return sorted(rows[index] for index in near.tolist())


def _special(settings: dict[str, object]) -> Iterator[int]:
    for name, value in settings.items():
        if name.endswith(("token_id", "token_index")):
            yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[bool]:
    """Let each module of a model compute in float32, with a copy of its own weights that lives as long as its call.

    Yields True if all weights are float32 then. Nothing changes if a weight is quantized, sharded or offloaded.
    """
    parameters = list(model.parameters())
    plain = all(type(p) is torch.nn.Parameter and p.is_floating_point() and not p.is_meta for p in parameters)
    if not plain or any(library_compat.is_hooked(module) for module in model.modules()):
        yield False
        return
    before: dict[torch.nn.Parameter, torch.Tensor] = {}

    def widen(module: nn.Module, inputs: object) -> None:
        for p in module.parameters(recurse=False):
            if p.element_size() < 4:
                before[p] = p.data
                p.data = p.data.float()

    def restore(module: nn.Module, inputs: object, output: object) -> None:
        for p in module.parameters(recurse=False):
            if p in before:
                p.data = before.pop(p)

    own = [module for module in model.modules() if any(p.element_size() < 4 for p in module.parameters(recurse=False))]
    hooks = [module.register_forward_pre_hook(widen) for module in own]
    hooks += [module.register_forward_hook(restore) for module in own]
    try:
        yield True
    finally:
        for hook in hooks:
            hook.remove()
        for p, data in before.items():  # of modules that raised an error
            p.data = data


def _largest(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest difference of a state [width] between lists of states, relative to the expected state."""
    return max(_distance(one.float(), other.float()) for one, other in zip(found, expected, strict=True))


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    differences = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(differences.max()) if differences.isfinite().all() else math.inf
