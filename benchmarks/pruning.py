"""Time Wanda block by block, which is `importance: wanda`, against its one-shot form, in turns on the same model.

Block by block, each block runs twice on the calibration data: once up to its last linear layer, for the norms of its
inputs, and once pruned, for the inputs of the next block. With much calibration data, the time is therefore up to 1.8
times that of one pass; Wanda's own code takes two passes. Models are random, and the calibration text as well.

    python benchmarks/pruning.py --samples 32 --length 512
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from common import build_model, conclude, options, seconds

from coppice.core import logs
from coppice.stages import prune

if TYPE_CHECKING:
    import argparse

    import torch
    from transformers import PreTrainedModel

    from coppice.core.aliases import Record

BAR = 1.8  # times the one-shot form
FORMS = ("wanda", "wanda-one-shot")


def main() -> int:
    """Run the benchmark and return the exit status."""
    parser = options(__doc__, models=["llama-12x512", "llama-24x1024"])
    parser.add_argument("--samples", type=int, default=8, help="calibration windows (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of each (default: %(default)s)")
    arguments = parser.parse_args()
    logs.limit_threads(arguments.threads)
    results = {name: measure(name, arguments) for name in arguments.models}
    return conclude(results, arguments, below_bars, show, summary)


def measure(name: str, arguments: argparse.Namespace) -> Record:
    """Return the seconds of both forms and of one pass through all blocks, and the first two as a ratio."""
    import torch

    model = build_model(name)
    random = torch.Generator().manual_seed(0)
    shape = (arguments.samples, 1, arguments.length)
    batches = list(torch.randint(3, model.config.vocab_size, shape, generator=random))
    runs = {form: [] for form in (*FORMS, "pass")}
    for _ in range(arguments.repeats):
        for form in FORMS:
            runs[form].append(pruned(model, form, batches, arguments.threads))
        with torch.no_grad():
            runs["pass"].append(seconds(lambda: [model.model(batch) for batch in batches], arguments.threads)[1])
    fastest = {form: min(own) for form, own in runs.items()}
    return fastest | {"ratio": fastest["wanda"] / fastest["wanda-one-shot"]}


def pruned(model: PreTrainedModel, form: str, batches: Sequence[torch.Tensor], threads: int) -> float:
    """Return the seconds that a form takes to prune a copy of the model."""
    point = {"method": "unstructured", "importance": form, "ratio": 0.5}
    ours = copy.deepcopy(model)
    return seconds(lambda: prune.prune(ours, point, batches), threads)[1]


def below_bars(name: str, result: Record) -> Iterator[str]:
    """Yield a sentence if the bar is missed."""
    if result["ratio"] > BAR:
        yield f"{name}: block by block takes {result['ratio']:.2f} times the one-shot form; the bar is {BAR}"


def show(name: str, result: Record) -> None:
    """Print the seconds of one model."""
    print(f"{name}: " + ", ".join(f"{form} {result[form]:.1f} s" for form in (*FORMS, "pass")))


def summary(results: Mapping[str, Record], failures: Sequence[str]) -> str:
    """Return the last line of the output."""
    ratios = ", ".join(f"{name} {result['ratio']:.2f}" for name, result in results.items())
    return f"pruning: block by block / one-shot: {ratios}; {'FAIL' if failures else 'pass'}"


if __name__ == "__main__":
    sys.exit(main())
