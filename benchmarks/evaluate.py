"""Compare zero-shot scoring by this package's engine with lm-eval's HF backend, on the same model and requests.

Both get the same lm-eval requests, task by task and in turn; the harness runs at the batch size at which it is fastest
here. On one thread, time is the process's CPU time, so that other work on the machine counts little. Models are random,
in the shapes of Llama (32k vocabulary), Qwen2 (128k vocabulary, grouped KV heads) and Mistral (sliding window).

The floor is the time that the unavoidable matrix products would take at the speed of the model's own products: unique
tokens x 2 x the body's parameters, plus unique scored positions x 2 x width x vocabulary.

    python benchmarks/evaluate.py --data FOLDER --check --json evaluate.json

FOLDER holds real rows, `{task}/test.jsonl` or `{task}/validation.jsonl`, with the columns of the hub's data sets.
Without --data, the rows are those of the miniature study.
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common import MatrixProducts, build_model, conclude, on_gpu, options, seconds

from coppice.core import logs

if TYPE_CHECKING:
    import argparse

    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from coppice.core.aliases import Record
    from coppice.stages.evaluate.zero_shot.harness_model import PrefixTreeLM

# Number of items in the official evaluation splits; the overall results weight the tasks by it.
SIZES = {
    "boolq": 3270,
    "piqa": 1838,
    "hellaswag": 10042,
    "winogrande": 1267,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "openbookqa": 500,
}
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
BARS = {"ratio": 2.5, "ratio_large_vocabulary": 4.0, "difference": 1e-3, "floor_share": 0.75}
LARGE_VOCABULARY = 100_000


def main() -> int:
    """Run the benchmark and return the exit status."""
    arguments = parse_arguments()
    logs.limit_threads(arguments.threads)
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    import lm_eval.models.huggingface  # noqa: F401  -- it sets the log level, so it comes before ours

    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        records = prepare_rows(arguments.data, Path(scratch), arguments.limit)
        tokenizer = train_tokenizer(arguments.data, Path(scratch))
        results = {name: measure_model(name, records, tokenizer, arguments) for name in arguments.models}
    return conclude(results, arguments, below_bars, show, summary)


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = options(__doc__, models=["llama-42m", "qwen-88m", "mistral-39m"])
    parser.add_argument("--limit", type=int, default=20, help="items per task (default: %(default)s)")
    parser.add_argument(
        "--data", metavar="FOLDER", default=os.environ.get("COPPICE_REALDATA"), help="folder of real rows"
    )
    return parser.parse_args()


def prepare_rows(folder: str | None, scratch: Path, limit: int) -> dict[str, Path]:
    """Prepare `limit` random rows of each task and return task -> path of its dataset.json."""
    from coppice import data

    if not folder:
        from coppice.miniature.prepare import prepare_world

        prepare_world(scratch / "rows", seed=0)
        return {name: scratch / "rows" / name / "dataset.json" for name in SIZES}
    for name in SIZES:
        files = [Path(folder, name, f"{split}.jsonl") for split in ("test", "validation")]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            sys.exit(f"evaluate: {files[0]} and {files[1]} are both missing; put the rows of {name} into one of them")
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        rows = random.Random(0).sample(rows, min(limit, len(rows)))
        data.write(name, {"report": rows}, scratch / "rows" / name)
    return {name: scratch / "rows" / name / "dataset.json" for name in SIZES}


def train_tokenizer(folder: str | None, scratch: Path) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on text that no task is scored on."""
    from coppice import data
    from coppice.miniature.tokenizer import train_tokenizer

    if folder:
        texts = []
        for file in sorted(Path(folder).glob("*/train*.jsonl")):
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            texts += [" ".join(str(value) for value in row.values()) for row in rows]
    else:
        record = scratch / "rows" / "wikitext2" / "dataset.json"
        texts = data.load(record, "train")["text"]
    return train_tokenizer(texts, 32000, 2048)


def measure_model(
    name: str, records: Mapping[str, Path], tokenizer: PreTrainedTokenizerFast, arguments: argparse.Namespace
) -> Record:
    """Return the results of one model: its facts, the harness's batch size, results per task, and overall results."""
    from lm_eval.models.huggingface import HFLM

    from coppice.stages.evaluate import zero_shot

    model = build_model(name)
    engine = zero_shot.language_model(model, tokenizer, "prefix-tree", 1)
    reference = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    requests = {task: task_requests(task, record, arguments.limit) for task, record in records.items()}
    engine.loglikelihood(requests["winogrande"][:8], disable_tqdm=True)  # warm up
    reference.batch_size_per_gpu, searched = best_batch_size(reference, requests, arguments.repeats)
    products = MatrixProducts(model)
    tasks = {}
    for task, asked in requests.items():
        tasks[task] = compare(engine, reference, products, asked, arguments)
        tasks[task] |= floor(engine, model, asked, tasks[task]["gemm_gflops"] * 1e9)
        print(f"{name} {task}: {tasks[task]['ratio']:.2f}x", file=sys.stderr, flush=True)
    facts = {"vocabulary": model.config.vocab_size, "dtype": str(model.dtype), "device": str(model.device)}
    facts |= {"batch_size": reference.batch_size, "batch_sizes_tried": searched}
    return facts | {"tasks": tasks, "overall": overall(tasks)}


def task_requests(name: str, record: Path, limit: int) -> list[Instance]:
    """Return the lm-eval requests of the first `limit` items of a task."""
    from coppice.stages.evaluate import zero_shot

    task = zero_shot.task(name, record, "report")
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return task.instances


def best_batch_size(
    reference: HFLM, requests: Mapping[str, Sequence[Instance]], repeats: int, items: int = 3
) -> tuple[int, dict[int, float]]:
    """Find the batch size at which the harness is fastest on a few items of each task.

    The search starts at 4 (32 on a GPU) and goes to larger or smaller batches as long as they are faster.

    Returns:
        (batch size, batch size -> seconds per item for each one tried).
    """
    tried = {}

    def cost(place: int) -> float:
        size = BATCH_SIZES[place]
        if size not in tried:
            reference.batch_size_per_gpu = size
            tried[size] = 0.0
            for task, asked in requests.items():
                few = [request for request in asked if request.doc_id < items]
                runs = [
                    seconds(lambda few=few: reference.loglikelihood(few, disable_tqdm=True)) for _ in range(repeats)
                ]
                tried[size] += min(spent for _, spent in runs) * SIZES[task]
        return tried[size]

    place = 5 if on_gpu() else 2
    for step in (1, -1):
        while 0 <= place + step < len(BATCH_SIZES) and cost(place + step) < cost(place):
            place += step
    scale = items * sum(SIZES.values())
    return BATCH_SIZES[place], {size: spent / scale for size, spent in sorted(tried.items())}


def compare(
    engine: PrefixTreeLM,
    reference: HFLM,
    products: MatrixProducts,
    asked: Sequence[Instance],
    arguments: argparse.Namespace,
) -> Record:
    """Return the seconds of both engines on the requests of one task, and how far their answers differ.

    The speed of matrix products varies on a shared machine, so it is measured right before and after the engine's run.
    """
    import torch

    runs, answers = [], {}
    before = engine._packer.tree.tokens_run
    for _ in range(arguments.repeats):
        spent, rates = {}, [products.rate()]
        for label, lm in (("engine", engine), ("harness", reference)):
            answers[label], spent[label] = seconds(
                lambda lm=lm: lm.loglikelihood(asked, disable_tqdm=True), arguments.threads
            )
            rates.append(products.rate())
        runs.append((spent["engine"], spent["harness"], (rates[0] + rates[1]) / 2))
    run = (engine._packer.tree.tokens_run - before) // arguments.repeats
    values = {label: torch.tensor([value for value, _ in found]) for label, found in answers.items()}
    ours, theirs, rate = min(run[0] for run in runs), min(run[1] for run in runs), min(runs)[2]
    agree = [a == b for a, b in zip(picks(asked, values["engine"]), picks(asked, values["harness"]), strict=True)]
    return {
        "items": len({request.doc_id for request in asked}),
        "requests": len(asked),
        "seconds": ours,
        "harness_seconds": theirs,
        "ratio": theirs / ours,
        "tokens_run": run,
        "gemm_gflops": rate / 1e9,
        "difference": float((values["engine"] - values["harness"]).abs().max()),
        "greedy_equal": [g for _, g in answers["engine"]] == [g for _, g in answers["harness"]],
        "picks_equal": sum(agree) / len(agree),
    }


def picks(asked: Sequence[Instance], values: torch.Tensor) -> list[int]:
    """Return the likeliest choice of each item twice: by log-likelihood, and by log-likelihood per character."""
    items = {}
    for request, value in zip(asked, values.tolist(), strict=True):
        items.setdefault(request.doc_id, []).append((value, value / max(1, len(request.args[1].strip()))))
    best = []
    for choices in items.values():
        best += [max(range(len(choices)), key=lambda i, k=kind, c=choices: c[i][k]) for kind in (0, 1)]
    return best


def floor(engine: PrefixTreeLM, model: PreTrainedModel, asked: Sequence[Instance], rate: float) -> Record:
    """Return the least work for these requests, and its seconds at `rate` operations per second.

    The count is independent of the engine's tree. Each distinct prefix is one token that the body must process; each
    distinct prefix before a scored token is one position that needs the output layer.
    """
    run, scored, harness = set(), set(), 0
    for request in asked:
        context, ending = engine._encode_pair(*request.args)
        tokens = tuple(context + ending)[:-1]
        run.update(tokens[: end + 1] for end in range(len(tokens)))
        scored.update(tokens[: end + 1] for end in range(len(tokens) - len(ending), len(tokens)))
        harness += len(tokens)
    config = model.config
    body = sum(p.numel() for p in model.model.layers.parameters())
    work = 2 * len(run) * body + 2 * len(scored) * config.hidden_size * config.vocab_size
    counts = {"tokens_unique": len(run), "tokens_scored": len(scored), "tokens_requested": harness}
    return counts | {"floor_seconds": work / rate}


def overall(tasks: Mapping[str, Record]) -> Record:
    """Return the results of all tasks together, weighted by the sizes of their official splits."""

    def total(key: str) -> float:
        return sum(SIZES[task] * result[key] / result["items"] for task, result in tasks.items())

    return {
        "ratio": total("harness_seconds") / total("seconds"),
        "floor_share": total("floor_seconds") / total("seconds"),
        "hours_at_real_size": total("seconds") / 3600,
        "harness_hours_at_real_size": total("harness_seconds") / 3600,
        "difference": max(result["difference"] for result in tasks.values()),
        "greedy_equal": all(result["greedy_equal"] for result in tasks.values()),
        "picks_equal": min(result["picks_equal"] for result in tasks.values()),
    }


def below_bars(name: str, result: Record) -> Iterator[str]:
    """Yield a sentence per missed bar.

    Differences have a bar in float32 only: in bfloat16, rounding alone moves log-likelihoods by about 1.
    """
    found = result["overall"]
    bar = BARS["ratio_large_vocabulary" if result["vocabulary"] > LARGE_VOCABULARY else "ratio"]
    if found["ratio"] < bar:
        yield f"{name}: {found['ratio']:.2f} times as fast as the harness; the bar is {bar}"
    if result["dtype"] == "torch.float32" and found["difference"] > BARS["difference"]:
        yield f"{name}: log-likelihoods differ by {found['difference']:.1e}; the bar is {BARS['difference']:.0e}"
    if result["dtype"] == "torch.float32" and (found["picks_equal"] < 1 or not found["greedy_equal"]):
        yield f"{name}: {found['picks_equal']:.1%} of picks are equal; greedy answers equal: {found['greedy_equal']}"
    if found["floor_share"] < BARS["floor_share"]:
        yield f"{name}: {found['floor_share']:.0%} of the floor's speed; the bar is {BARS['floor_share']:.0%}"


def show(name: str, result: Record) -> None:
    """Print the results of one model as a table."""
    from rich.console import Console
    from rich.table import Table

    title = f"{name}, {result['dtype'].removeprefix('torch.')}: harness at batch size {result['batch_size']}"
    table = Table(title=title, title_justify="left")
    for column in (
        "task",
        "items",
        "tokens requested",
        "unique",
        "run",
        "s",
        "harness s",
        "ratio",
        "GFLOP/s",
        "of floor",
    ):
        table.add_column(column, justify="left" if column == "task" else "right")
    table.add_column("difference", justify="right")
    table.add_column("picks equal", justify="right")
    for task, found in result["tasks"].items():
        counts = (found[key] for key in ("items", "tokens_requested", "tokens_unique", "tokens_run"))
        times = [f"{found[key]:.2f}" for key in ("seconds", "harness_seconds", "ratio")]
        times.append(f"{found['gemm_gflops']:.0f}")
        share = f"{found['floor_seconds'] / found['seconds']:.0%}"
        table.add_row(
            task, *map(str, counts), *times, share, f"{found['difference']:.0e}", f"{found['picks_equal']:.0%}"
        )
    found = result["overall"]
    table.add_section()
    last = (f"{found['ratio']:.2f}", "", f"{found['floor_share']:.0%}", f"{found['difference']:.0e}")
    table.add_row("all, at real sizes", "", "", "", "", "", "", *last, f"{found['picks_equal']:.0%}")
    Console(width=130).print(table)


def summary(results: Mapping[str, Record], failures: Sequence[str]) -> str:
    """Return the last line of the output."""
    parts = [
        f"{name} {result['overall']['ratio']:.2f}x ({result['overall']['floor_share']:.0%} of the floor's speed)"
        for name, result in results.items()
    ]
    worst = max(result["overall"]["difference"] for result in results.values())
    return f"evaluate: {', '.join(parts)}; largest difference {worst:.0e}; {'FAIL' if failures else 'pass'}"


if __name__ == "__main__":
    sys.exit(main())
