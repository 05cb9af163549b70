"""Compare the peak memory of jobs with what `models.estimates` predicts.

Each job runs a stage's own function for a step or two, on a random model and in a fresh process: fine-tuning,
evaluation (perplexity, tasks, generation, cost), and pruning by every method. Models have the shapes of Llama, Qwen2
and Mistral. The benchmark measures the process's peak resident memory, imports included, and on a GPU its peak GPU
memory, including CUDA's context and the allocator's cache.

    python benchmarks/memory.py --check --json memory.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from common import SHAPES, build_model, conclude, on_gpu

from coppice import models
from coppice.core import jobs, logs, records
from coppice.core.aliases import Record
from coppice.models import estimates
from coppice.stages import recover
from coppice.study import settings

if TYPE_CHECKING:
    from coppice.study.settings import Study

ROOT = Path(__file__).resolve().parents[1]
BARS = {"under": 1.15, "over": 1.3}  # how many times the estimate the peak may be, and the peak the estimate
POINTS = {
    "depth": {"method": "depth", "ratio": 0.25},
    "taylor": {"method": "width", "ratio": 0.25, "importance": "taylor", "parts": ["mlp"]},
    "activation": {"method": "width", "ratio": 0.25, "importance": "activation", "parts": ["mlp"]},
    "magnitude": {"method": "width", "ratio": 0.25, "importance": "magnitude", "parts": ["mlp"]},
    "unstructured": {"method": "unstructured", "ratio": 0.5, "importance": "wanda"},
    "sparsegpt": {"method": "unstructured", "ratio": 0.5, "importance": "sparsegpt"},
}
JOBS = ("finetune", "evaluate", *POINTS)
DEFAULT = ("llama-11m", "mistral-39m", "llama-240m")
DTYPES = ("float32", "bfloat16", "float16")
TEXT_ROWS = 400  # of the text for perplexity, enough for a few windows
STUDY = {  # real sizes, but only a step or two
    "finetune": {"max_steps": 2, "eval_steps": 1, "save_steps": 1, "warmup_steps": 1, "data": {"val_size": 16}},
    "evaluate": {"zero_shot": {"limit": 20, "tasks": ["hellaswag", "boolq"]}, "perplexity": {"datasets": ["ptb"]}},
}


def main() -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with status 1 if an estimate misses its bar")
    parser.add_argument("--json", metavar="FILE", help="write all results to this file")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each job (default: %(default)s)")
    parser.add_argument(
        "--models", nargs="+", choices=SHAPES, default=DEFAULT, help="model shapes (default: the small ones)"
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=("float32",),
        help="precisions (default: float32; bfloat16 is slow on most CPUs)",
        choices=DTYPES,
    )
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS, help="jobs to measure (default: all)")
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "JOB"), help=argparse.SUPPRESS)  # used by fresh processes
    arguments = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="disabled")
    logs.limit_threads(arguments.threads)
    if arguments.one:
        run_one(Path(arguments.one[0]), arguments.one[1], arguments)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        results = {}
        for name in arguments.models:
            for dtype in arguments.dtypes:
                folder = Path(scratch) / f"{name}.{dtype}"
                in_fresh_process(arguments, name, dtype, folder, "build")
                results[f"{name} {dtype}"] = {
                    job: in_fresh_process(arguments, name, dtype, folder, job) for job in arguments.jobs
                }
    return conclude(results, arguments, below_bars, show, summary)


def in_fresh_process(arguments: argparse.Namespace, name: str, dtype: str, folder: Path, job: str) -> Record:
    """Run this script for one job in a fresh process, and return the JSON that it prints."""
    command = [sys.executable, __file__, "--threads", str(arguments.threads), "--models", name, "--dtypes", dtype]
    started = time.monotonic()
    done = subprocess.run([*command, "--one", folder, job], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"memory: {name} {dtype} {job} failed:\n{done.stderr[-4000:]}")
    spent = time.monotonic() - started
    print(f"{name} {dtype} {job}: {done.stdout.strip()} ({spent:.0f} s)", file=sys.stderr, flush=True)
    return json.loads(done.stdout)


def run_one(folder: Path, job: str, arguments: argparse.Namespace) -> None:
    """Build the checkpoint and its data, or run one job on them; print the job's results as JSON."""
    (name,), (dtype,) = arguments.models, arguments.dtypes
    if job == "build":
        build(folder, name, dtype)
        print("{}")
        return
    study = study_of(folder, dtype)
    with jobs.computing(folder / f"{job}.log", None, job, arguments.threads, {}):
        run_job(job, study, folder)
        measured = {"host": records.peak_memory()["host"], "gpu": peak_of_gpu()}
    estimate = expected(job, study, folder, arguments.threads)._asdict()
    print(json.dumps({at: {"peak": peak, "estimate": estimate[at]} for at, peak in measured.items() if peak}))


def peak_of_gpu() -> int:
    """Return the peak bytes of the first GPU that this process used, including CUDA's context; 0 without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0
    # The driver knows what the process holds now, the allocator how much more it reserved at its peak.
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved() + torch.cuda.max_memory_reserved()


def expected(job: str, study: Study, folder: Path, threads: int) -> estimates.Peak:
    """Return the estimated peak of the job, an `estimates.Peak`."""
    machine = estimates.Machine(gpus=int(on_gpu()), threads=threads)
    shape, model = estimates.shape_of(folder / "config.json"), study.models["Random"].model_dump()
    if job == "finetune":
        settings = recover.TrainingSettings.model_validate(study.finetune.model_dump())
        memory = recover.recovery_of(settings).trained.memory(shape, settings)
        return estimates.finetune(shape, model, settings, machine, memory)
    if job == "evaluate":
        return estimates.evaluate(shape, model, machine)
    return estimates.prune(shape, model, [POINTS[job]], study.calibration_of("Random").model_dump(), machine)


def build(folder: Path, name: str, dtype: str) -> None:
    """Write a random model, the miniature world's data sets, and a tokenizer trained on their text."""
    import torch

    from coppice import data
    from coppice.miniature.prepare import prepare_world
    from coppice.miniature.tokenizer import train_tokenizer

    prepare_world(folder / "world", seed=0)
    text = data.load(folder / "world/ptb/dataset.json", "report").to_list()[:TEXT_ROWS]
    data.write("ptb", {"report": text, "selection": text}, folder / "world/ptb")
    rows = data.load(folder / "world/alpaca/dataset.json", "train").to_list()
    tokenizer = train_tokenizer([" ".join(map(str, row.values())) for row in rows], 32000, 2048)
    model = build_model(name).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def study_of(folder: Path, dtype: str) -> Study:
    """Return the default study with real sizes, for the one model in `folder`."""
    given = yaml.safe_load((ROOT / "config/config.yaml").read_text(encoding="utf-8"))
    for section in ("finetune", "evaluate"):
        given[section] = STUDY[section]
    given["candidates"] = {"prune": list(POINTS.values()), "calibration": {"samples": 8, "length": 512}}
    given["select"] = {"configs": {"best_ppl": {"metric": "ppl.ptb", "mode": "min"}}}
    given["models"] = {"Random": {"base": str(folder), "variant": "base", "family": "llama", "dtype": dtype}}
    return settings.load(given)


def run_job(job: str, study: Study, folder: Path) -> None:
    """Call the stage's own function as its script does."""
    from coppice.stages import evaluate
    from coppice.stages.prune import candidates

    source = models.Source(str(folder), dtype=study.models["Random"].dtype)
    names = ("alpaca", "boolq", "hellaswag", "ptb", "wikitext2")
    datasets = {name: str(folder / "world" / name / "dataset.json") for name in names}
    if job == "finetune":
        identity = {"model": "Random", "config": "best_ppl"}
        chosen = {"alpaca": datasets["alpaca"]}
        how = recover.TrainingSettings.model_validate(study.finetune.model_dump() | {"seeds": None})
        recover.finetune(recover.TrainingRequest(identity, source, chosen, how, "alpaca", folder / "tuned"))
    elif job == "evaluate":
        identity = {"model": "Random", "config": None, "stage": "dense"}
        evaluate.evaluate(evaluate.EvaluationRequest(identity, source, study.evaluate, datasets, folder / "evaluated"))
    else:
        calibration = study.calibration_of("Random").model_dump() | {"record": datasets["wikitext2"]}
        identity = {"model": "Random", "candidate": job}
        request = candidates.PruningRequest(source, POINTS[job], calibration, folder / "pruned" / job)
        candidates.prune(identity, request)


def each(result: Record) -> list[tuple[str, str, int, int]]:
    """Return (job, "host" or "gpu", peak, estimate) in bytes for every job of a model."""
    return [(job, at, *sizes.values()) for job, found in result.items() for at, sizes in found.items()]


def below_bars(name: str, result: Record) -> Iterator[str]:
    """Yield a sentence per estimate that misses its bar."""
    for job, at, peak, estimate in each(result):
        if not 1 / BARS["over"] <= peak / estimate <= BARS["under"]:
            yield f"{name} {job}: the {at} peak is {peak / estimate:.2f} times the estimate"


def show(name: str, result: Record) -> None:
    """Print the peaks of one model with their estimates, in MB."""
    print(f"\n{name}{'':<{max(1, 28 - len(name))}}{'':6}{'peak':>9}{'estimate':>10}{'peak / estimate':>17}")
    for job, at, peak, estimate in each(result):
        print(f"  {job:<26}{at:<6}{peak / 1e6:9.0f}{estimate / 1e6:10.0f}{peak / estimate:17.2f}")


def summary(results: Mapping[str, Record], failures: Sequence[str]) -> str:
    """Return the last line of the output."""
    shares = [peak / estimate for result in results.values() for _, _, peak, estimate in each(result)]
    return (
        f"memory: {len(shares)} peaks, {min(shares):.2f} to {max(shares):.2f} times their estimates (sizes in MB); "
        f"{f'FAIL: {len(failures)} miss their bars' if failures else 'pass'}"
    )


if __name__ == "__main__":
    sys.exit(main())
