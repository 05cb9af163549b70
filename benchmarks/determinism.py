"""Measure how far results move with the number of threads or on a GPU, and which settings repeat exactly.

Trains and evaluates a checkpoint of a finished miniature study with the study's own code, each time in a new process.
With a GPU, the benchmark compares CPU and GPU; without one, it compares one thread with two.

    python benchmarks/determinism.py [--results results] [--resources resources] [--steps 40] [--check]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common import conclude, on_gpu, quietly

if TYPE_CHECKING:
    from coppice.core.aliases import Record

TASKS = ("piqa", "arc_easy")
# name -> (threads, whether on the GPU, precision); each runs twice, the second time as "... again"
ON_CPU = {"1 thread": (1, False, "float32"), "2 threads": (2, False, "float32")}
ON_GPU = {"CPU": (4, False, "float32"), "GPU": (4, True, "float32"), "GPU in bfloat16": (4, True, "bfloat16")}


def main() -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", default="results")
    parser.add_argument("--resources", default="resources")
    parser.add_argument("--model", default="Mistral")
    parser.add_argument("--config", default="best_acc")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", help="write all results to this file")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a repeated run gives other results")
    parser.add_argument("--one", nargs=3, metavar=("THREADS", "DTYPE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        threads, dtype, folder = arguments.one
        once(arguments, int(threads), dtype, Path(folder))
        return 0
    runs = ON_GPU if on_gpu() else ON_CPU
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name, (threads, uses_gpu, dtype) in runs.items():
            for each in (name, f"{name} again"):
                own = Path(folder) / each.replace(" ", "-")
                command = [sys.executable, *sys.argv, "--one", str(threads), dtype, str(own)]
                quietly(command, os.environ | ({} if uses_gpu else {"CUDA_VISIBLE_DEVICES": ""}))
                found[each] = measured(own)
    first, *others = runs
    pairs = [(name, f"{name} again") for name in runs] + [(first, other) for other in others]
    results = {f"{one} and {other}": apart(found[one], found[other]) for one, other in pairs}
    return conclude(results, arguments, below, show, summary)


def once(arguments: argparse.Namespace, threads: int, dtype: str, folder: Path) -> None:
    """Train for `arguments.steps` steps and evaluate before and after, with `threads` and `dtype`, into `folder`."""
    from coppice.core import logs

    logs.limit_threads(threads)
    from coppice import models
    from coppice.stages import evaluate, recover
    from coppice.study import settings

    resources = Path(arguments.resources) / "miniature"
    section = {"max_steps": arguments.steps, "eval_steps": 10, "save_steps": 40, "data": {"val_size": 100}}
    zero_shot = {"tasks": list(TASKS), "limit": 100}
    study = settings.load(
        {
            "models": {"M": {"base": "miniature/mistral"}},
            "finetune": section | {"learning_rate": 0.004, "batch_size": 16, "warmup_steps": 4},
            "evaluate": {"zero_shot": zero_shot, "cost": {"enabled": False}},
            "datasets": {name: {"path": f"miniature/{name}"} for name in ("alpaca", "wikitext2", "ptb", *TASKS)},
        }
    )
    source = models.Source(f"{arguments.results}/for_finetuning/{arguments.model}/{arguments.config}", dtype=dtype)
    sets = {name: resources / name / "dataset.json" for name in ("alpaca", "wikitext2", "ptb", *TASKS)}
    who = {"model": arguments.model, "config": arguments.config}
    training = {name: sets[name] for name in ("alpaca",)}
    how = recover.TrainingSettings.model_validate(study.finetune.model_dump())
    recover.finetune(recover.TrainingRequest(who, source, training, how, "alpaca", folder / "tuned", study.seed))
    tuned = who | {"stage": "finetuned"}
    evaluate.evaluate(
        evaluate.EvaluationRequest(tuned, source, study.evaluate, sets, folder / "evaluated", adapter=folder / "tuned")
    )
    evaluate.evaluate(
        evaluate.EvaluationRequest(who | {"stage": "pruned"}, source, study.evaluate, sets, folder / "before")
    )


def measured(folder: Path) -> Record:
    """Return what is compared of one run.

    Returns:
        {losses: of the training, adapter: a flat tensor, loglikelihoods, before: log-likelihoods before training,
        picks: predictions, windows: window losses}.
    """
    import pandas
    import torch
    from safetensors.torch import load_file

    history = json.loads((folder / "tuned/training_state.json").read_text())["history"]
    tensors = load_file(folder / "tuned/adapter_model.safetensors")
    tables, before = (
        [pandas.read_parquet(folder / stage / f"samples/{task}.parquet") for task in TASKS]
        for stage in ("evaluated", "before")
    )
    texts = json.loads((folder / "evaluated/ppl_results.json").read_text())["perplexity"]
    return {
        "losses": [entry[key] for entry in history for key in ("loss", "eval_loss") if key in entry],
        "adapter": torch.cat([tensors[name].flatten() for name in sorted(tensors)]),
        "loglikelihoods": [value for table in tables for row in table["loglikelihoods"] for value in row],
        "before": [value for table in before for row in table["loglikelihoods"] for value in row],
        "picks": [pick for table in tables for pick in table["prediction"]],
        "windows": [window["nll_per_token"] for text in texts.values() for window in text["window_losses"]],
    }


def apart(one: Record, other: Record) -> Record:
    """Return the largest differences between two runs; for adapters, the norm of the difference over the norm."""
    found = {
        name: max(abs(a - b) for a, b in zip(one[name], other[name], strict=True))
        for name in ("losses", "before", "loglikelihoods", "windows")
    }
    found["adapter"] = float((one["adapter"] - other["adapter"]).norm() / one["adapter"].norm())
    differ = sum(a != b for a, b in zip(one["picks"], other["picks"], strict=True))
    return found | {"picks": differ, "items": len(one["picks"])}


def below(name: str, result: Record) -> list[str]:
    """Return a sentence if a repeated run differs from the first."""
    moved = [key for key, value in result.items() if key != "items" and value]
    return [f"{name}: {', '.join(moved)} differ"] if "again" in name and moved else []


def summary(results: Mapping[str, Record], failures: Sequence[str]) -> str:
    """Return the last line of the output."""
    return f"determinism: repeated runs {'differ' if failures else 'give identical results'}"


def show(name: str, result: Record) -> None:
    """Print one line about two runs."""
    print(
        f"{name} differ by: log-likelihoods before training {result['before']:.1e}; training losses "
        f"{result['losses']:.1e}; adapter {result['adapter']:.1e} (relative norm); after training, log-likelihoods "
        f"{result['loglikelihoods']:.1e}, window losses {result['windows']:.1e}, "
        f"picks {result['picks']} of {result['items']}"
    )


if __name__ == "__main__":
    sys.exit(main())
