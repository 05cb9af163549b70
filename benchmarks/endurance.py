"""Measure whether the memory and the files of long runs stay flat.

Each stage runs the study's own code in a new process on random miniature models. For stages with steps (of a training,
batches of an evaluation, blocks of a model to prune), the mean memory in the second quarter of the steps is compared
with that in the last quarter; the first quarter fills caches and does not count. For stages without steps (data,
comparison, report), the peak is compared with that of a run four times as long, which gives the bytes that one more
row, item or model takes.

    python benchmarks/endurance.py [--stages training data ...] [--steps 2000] [--rows 4000] [--check] [--json FILE]

Runs on Linux only: it reads a process's memory from /proc.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from common import ROOT, conclude, quietly

if TYPE_CHECKING:
    import torch
    from synthetic_records import Synthetic
    from torch import nn

    from coppice.core import logs
    from coppice.core.aliases import Record
    from coppice.study.settings import Study

STEPS = ("training", "zero-shot", "perplexity", "prune")
# stage -> (the unit of its length, units in the shorter of its two runs, bytes that one more unit may take)
LENGTHS = {"data": ("rows", 50_000, 500), "compare": ("items a task", 1_000, 20_000), "report": ("models", 6, 3e6)}
STAGES = (*STEPS, *LENGTHS)
LONGER = 4  # how many times longer the second run is
GROWTH = 0.02  # allowed growth, as a share of the memory in the second quarter
BLOCKS = 64  # of the model to prune
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "vocab_size": 512,
}


def main() -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument(
        "--steps", type=int, default=2000, help="steps of the training, at least 8 (default: %(default)s)"
    )
    parser.add_argument(
        "--rows", type=int, default=4000, help="rows of the task and of the text (default: %(default)s)"
    )
    parser.add_argument("--json", help="write all results to this file")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if memory grows by more than its bar")
    parser.add_argument("--one", nargs=2, metavar=("STAGE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps < 8:
        parser.error(f"--steps: found {arguments.steps}, must be at least 8, so that there are quarters to compare")
    if arguments.one:
        once(arguments, arguments.one[0], Path(arguments.one[1]))
        return 0
    results = {}
    for stage in arguments.stages:
        with tempfile.TemporaryDirectory() as folder:
            lengths = [LENGTHS[stage][1] * times for times in (1, LONGER)] if stage in LENGTHS else [0]
            folders = [Path(folder) / str(length) for length in lengths]
            for own, length in zip(folders, lengths, strict=True):
                own.mkdir()
                command = [sys.executable, *sys.argv, "--one", stage, str(own), "--length", str(length)]
                quietly(command)
            results[stage] = peaks(folders, lengths) if stage in LENGTHS else summed_up(folders[0])
    return conclude(results, arguments, below, show, summary)


def once(arguments: argparse.Namespace, stage: str, folder: Path) -> None:
    """Run one stage in `folder` and write `memory.json`: resident bytes after each step, or only the peak."""
    run = at_length if stage in LENGTHS else step_by_step
    (folder / "memory.json").write_text(json.dumps(run(arguments, stage, folder)))


def at_length(arguments: argparse.Namespace, stage: str, folder: Path) -> int:
    """Run a stage without steps at the length `arguments.length` and return its peak memory in bytes.

    Another process makes the stage's input, so that the memory this takes is gone before the stage starts.
    """
    import multiprocessing

    from coppice.core import logs

    logs.limit_threads(1)
    make, run = {"data": (write_rows, prepare_data), "compare": (evaluated, compare), "report": (finished, report)}[
        stage
    ]
    maker = multiprocessing.get_context("fork").Process(target=make, args=(folder, arguments.length))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise SystemExit(f"{stage}: making its input failed with exit code {maker.exitcode}")
    with Peak() as peak:
        run(folder)
    return peak.bytes


class Peak:
    """Peak anonymous memory of this process while the block runs; memory-mapped files do not count."""

    def __enter__(self) -> Self:
        """Start to watch the memory."""
        self.bytes, self.over = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop watching."""
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.over.wait(0.01):
            status = Path("/proc/self/status").read_text()
            own = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            self.bytes = max(self.bytes, int(own.split()[1]) * 1024)


def write_rows(folder: Path, rows: int) -> None:
    """Write a JSON lines file with `rows` rows."""
    with open(folder / "rows.jsonl", "w") as file:
        for row in range(rows):
            file.write(json.dumps({"text": f"row {row} " + "word " * (row % 97)}) + "\n")


def prepare_data(folder: Path) -> None:
    """Prepare the rows as a data set of the study."""
    from coppice import data

    path = str(folder / "rows.jsonl")
    entry = {"path": path, "format": "json", "splits": {"train": path, "report": path}, "uses": ("text",)}
    data.prepare("long", entry, folder / "long")


def synthetic(folder: Path, **options: object) -> tuple[Synthetic, dict[str, Record]]:
    """Return (a study of synthetic records, the models that it can have), made by the code of the unit tests."""
    sys.path.insert(0, str(ROOT / "tests" / "unit"))
    import synthetic_records

    return synthetic_records.Synthetic(folder / "results", **options), synthetic_records.SIX


def evaluated(folder: Path, items: int) -> None:
    """Write the records of one model, evaluated on `items` items per task."""
    study, six = synthetic(folder, items=items, windows=30)
    study.models = {"Llama": six["Llama"]}
    study.build()


def compare(folder: Path) -> None:
    """Compare its evaluations before and after fine-tuning."""
    study, _ = synthetic(folder)
    study.compare("Llama", study.configs[0])


def finished(folder: Path, count: int) -> None:
    """Write the records of a study of `count` models with two configs each."""
    _, six = synthetic(folder)
    facts = list(six.values())
    models = {f"Model-{place}": facts[place % len(facts)] for place in range(count)}
    synthetic(folder, models=models, items=100, windows=50)[0].build(distinct=6)
    (folder / "models.json").write_text(json.dumps(models))


def report(folder: Path) -> None:
    """Write the study's report."""
    from coppice.report import study_report

    study, _ = synthetic(folder, models=json.loads((folder / "models.json").read_text()))
    study_report.write_report(study.results, study.pairs, study.models, folder / "report", {"seed": 42})


def step_by_step(arguments: argparse.Namespace, stage: str, folder: Path) -> list[int]:
    """Run a stage with steps and return the resident memory in bytes after each step."""
    import psutil

    from coppice.core import logs

    logs.limit_threads(1)
    from coppice import models
    from coppice.stages import recover
    from coppice.stages.recover.engine import progress

    process, memory = psutil.Process(), []

    def note(*arguments: object, **options: object) -> None:
        memory.append(process.memory_info().rss)

    if stage == "prune":
        prune(note)
        return memory
    model, sets = prepared(folder, arguments.rows)
    if stage == "training":
        progress.TrainingLog.on_step_end = note
        study = settings(finetune={"max_steps": arguments.steps, "batch_size": 4, "save_steps": 100, "eval_steps": 100})
        who, source = {"model": "M", "config": "c"}, models.Source(str(model))
        how = recover.TrainingSettings.model_validate(study.finetune.model_dump())
        recover.finetune(recover.TrainingRequest(who, source, {"alpaca": sets["alpaca"]}, how, "none", folder / "out"))
    else:
        evaluate(stage, model, sets, folder / "out", note)
    return memory


def prune(note: Callable[[], None]) -> None:
    """Prune a deep model by Taylor importance; call `note` after the gradients of each block."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    from coppice.stages import prune
    from coppice.stages.prune import blockwise

    model = MistralForCausalLM(MistralConfig(**SHAPE | {"num_hidden_layers": BLOCKS})).eval()
    compute = blockwise._block_gradients

    def noted(*arguments: object) -> dict[nn.Parameter, torch.Tensor]:
        gradients = compute(*arguments)
        note()
        return gradients

    blockwise._block_gradients = noted
    batches = [torch.randint(3, 512, (4, 128)) for _ in range(8)]
    prune.prune(model, {"method": "width", "ratio": 0.25, "importance": "taylor"}, batches)


def settings(**sections: Record) -> Study:
    """Return a study with the default settings, changed by `sections`."""
    from coppice.study import settings

    sections["finetune"] = {"data": {"val_size": 50}, "warmup_steps": 1} | sections.get("finetune", {})
    return settings.load({"models": {"M": {"base": "miniature/mistral"}}, "datasets": DATASETS} | sections)


DATASETS = {name: {"path": f"miniature/{name}"} for name in ("alpaca", "ptb", "wikitext2", "piqa")}


def evaluate(stage: str, model: Path, sets: Mapping[str, Path], folder: Path, note: Callable[[], None]) -> None:
    """Evaluate on a long task or a long text; call `note` after each batch."""
    from coppice import models
    from coppice.core import logs
    from coppice.stages import evaluate

    advance = logs.ProgressLines.advance

    def noted(self: logs.ProgressLines, count: int = 1) -> None:
        note()
        advance(self, count)

    logs.ProgressLines.advance = noted
    texts, tasks = (["ptb"], []) if stage == "perplexity" else ([], ["piqa"])
    study = settings(
        evaluate={"perplexity": {"datasets": texts}, "zero_shot": {"tasks": tasks}, "cost": {"enabled": False}},
        select={"configs": {"c": {"metric": "ppl.ptb" if texts else "piqa", "mode": "min" if texts else "max"}}},
    )
    who = {"model": "M", "config": "c", "stage": "dense"}
    evaluate.evaluate(evaluate.EvaluationRequest(who, models.Source(str(model)), study.evaluate, sets, folder))


def prepared(folder: Path, rows: int) -> tuple[Path, dict[str, Path]]:
    """Write a random model with a word-level tokenizer, and data sets of `rows` rows each.

    Returns:
        (model folder, data set -> dataset.json).
    """
    import random

    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    from coppice import data

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 512)}
    tokenizer = Tokenizer(kinds.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "w3"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "model")
    MistralForCausalLM(MistralConfig(**SHAPE)).save_pretrained(folder / "model")
    chance = random.Random(0)

    def text(longest: int) -> str:
        return " ".join(f"w{chance.randrange(3, 512)}" for _ in range(chance.randrange(4, longest)))

    tables = {
        "alpaca": {"train": [{"instruction": text(30), "input": "", "output": text(60)} for _ in range(rows)]},
        "ptb": {"report": [{"text": text(80)} for _ in range(rows)]},
        "piqa": {"report": [{"goal": text(40), "sol1": text(30), "sol2": text(30), "label": 0} for _ in range(rows)]},
    }
    for name, roles in tables.items():
        data.write(name, roles, folder / name)
    return folder / "model", {name: folder / name / "dataset.json" for name in tables}


def summed_up(folder: Path) -> Record:
    """Return {steps, early, late, files, log_bytes} of a run with steps.

    early and late are mean bytes in the second and the last quarter; files and log_bytes count what the run left.
    """
    memory = json.loads((folder / "memory.json").read_text())
    quarter = len(memory) // 4
    early, late = memory[quarter : 2 * quarter], memory[-quarter:]
    files = [path for path in (folder / "out").rglob("*") if path.is_file()]
    logs = [path.stat().st_size for path in files if path.name in ("training_log.txt", "training_state.json")]
    return {
        "steps": len(memory),
        "early": sum(early) / quarter,
        "late": sum(late) / quarter,
        "log_bytes": sum(logs),
        "files": len(files),
    }


def peaks(folders: Sequence[Path], lengths: Sequence[int]) -> Record:
    """Return {runs: [lengths, peak bytes at each length], each: bytes that one more unit adds to the peak}."""
    peak = [json.loads((folder / "memory.json").read_text()) for folder in folders]
    return {"runs": [lengths, peak], "each": (peak[1] - peak[0]) / (lengths[1] - lengths[0])}


def below(name: str, result: Record) -> list[str]:
    """Return a sentence if memory grew by more than its bar."""
    if name in LENGTHS:
        unit, _, limit = LENGTHS[name]
        return (
            [f"{name}: memory grew by {result['each']:.0f} bytes per unit ({unit})"] if result["each"] > limit else []
        )
    grown = result["late"] / result["early"] - 1
    return [f"{name}: memory grew by {grown:.1%}"] if grown > GROWTH else []


def show(name: str, result: Record) -> None:
    """Print one line about a stage."""
    if name in LENGTHS:
        unit = LENGTHS[name][0]
        runs = [f"{peak / 2**20:.1f} MiB for {length} {unit}" for length, peak in zip(*result["runs"], strict=True)]
        print(f"{name}: peak {', '.join(runs)}; {result['each'] / 1000:.1f} kB per unit")
        return
    early, late = result["early"] / 2**20, result["late"] / 2**20
    files = f"; {result['files']} files left, with {result['log_bytes'] / 1000:.0f} kB of logs"
    print(
        f"{name}: {result['steps']} steps, {early:.1f} MiB in the second quarter, {late:.1f} MiB in the last "
        f"({late - early:+.1f}){files if result['files'] else ''}"
    )


def summary(results: Mapping[str, Record], failures: Sequence[str]) -> str:
    """Return the last line of the output."""
    return "memory grows by more than its bar" if failures else f"memory is flat in {', '.join(results)}"


if __name__ == "__main__":
    sys.exit(main())
