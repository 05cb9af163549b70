"""Measure how long Snakemake plans a large study, compared with a trivial workflow of as many jobs.

The study has 200 models x 4 configs and a grid of 20 points. `snakemake -n -q` runs on both in turn; its time and peak
memory are measured.

    python benchmarks/planning.py --check --json planning.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import common
import yaml

BARS = {"ratio": 2.0, "peak_gb": 2.0}


def main() -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a result is above its bar")
    parser.add_argument("--json", metavar="FILE", help="write all results to this file")
    parser.add_argument("--models", type=int, default=200, help="models of the study (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=1, help="runs of each; the fastest counts (default: %(default)s)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        study, plain = Path(scratch, "study"), Path(scratch, "plain")
        write_study(study, arguments.models)
        jobs = count(study)
        write_plain(plain, jobs)
        runs = {"study": [], "plain": []}
        for _ in range(arguments.repeats):
            for name, folder in (("study", study), ("plain", plain)):
                runs[name].append(plan(folder))
                print(f"{name}: {runs[name][-1].seconds:.1f} s", file=sys.stderr, flush=True)
    seconds = {name: min(run.seconds for run in found) for name, found in runs.items()}
    processor = {name: min(run.processor for run in found) for name, found in runs.items()}
    result = {
        "jobs": jobs,
        "seconds": seconds["study"],
        "plain_seconds": seconds["plain"],
        "ratio": seconds["study"] / seconds["plain"],
        "processor_ratio": processor["study"] / processor["plain"],
        "processor_seconds": processor,
        "peak_gb": max(run.peak for run in runs["study"]) / 1e9,
        "plain_peak_gb": max(run.peak for run in runs["plain"]) / 1e9,
    }
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    beyond = [key for key, bar in BARS.items() if result[key] > bar]
    print(
        f"planning: {result['jobs']} jobs in {result['seconds']:.1f} s, {result['ratio']:.2f} times as long as a "
        f"trivial workflow of as many jobs ({result['processor_ratio']:.2f} times in CPU time), "
        f"peak {result['peak_gb']:.2f} GB; {'FAIL: ' + ', '.join(beyond) if beyond else 'pass'}"
    )
    return 1 if arguments.check and beyond else 0


def write_study(folder: Path, models: int) -> None:
    """Write a checkout whose configuration has `models` hub models, 4 configs and 20 candidates per model."""
    common.checkout(folder)
    settings = yaml.safe_load((common.ROOT / "config/full.yaml").read_text())
    settings["models"] = {
        f"M{i:03d}": {"base": f"org/m{i}", "variant": "base", "family": "llama", "parameters": 10**9}
        for i in range(models)
    }
    ratios = [0.05 + 0.04 * step for step in range(10)]
    settings["candidates"]["prune"] = [
        {"method": "width", "ratio": round(ratio, 2), "importance": kind, "parts": ["mlp"]}
        for ratio in ratios
        for kind in ("taylor", "magnitude")
    ]
    settings["select"]["configs"] |= {
        "best_ptb": {"metric": "ppl.ptb", "mode": "min"},
        "best_arc": {"metric": "arc_easy", "mode": "max"},
    }
    (folder / "config").mkdir()
    (folder / "config/config.yaml").write_text(yaml.safe_dump(settings))


def write_plain(folder: Path, jobs: int) -> None:
    """Write a workflow of `jobs` jobs: half create a file, half turn one into another; all have a parameter."""
    folder.mkdir()
    half = jobs // 2
    (folder / "Snakefile").write_text(
        f'rule all:\n    input: expand("b/{{i}}.txt", i=range({half}))\n'
        'rule first:\n    output: "a/{i}.txt"\n    params: x=1\n    resources: gpu=1\n    shell: "touch {output}"\n'
        'rule second:\n    input: "a/{i}.txt"\n    output: "b/{i}.txt"\n    params: x=1\n    shell: "touch {output}"\n'
    )


def count(folder: Path) -> int:
    """Return the number of jobs in a dry run's table."""
    lines = common.snakemake(folder, "-n", "-q", "rules").stdout.splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("total"))


@dataclass
class Run:
    """What a dry run took: wall seconds, CPU seconds and peak memory in bytes."""

    seconds: float
    processor: float
    peak: int


def plan(folder: Path) -> Run:
    """Run `snakemake -n -q` in `folder` and return its `Run`."""
    start = time.monotonic()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(["snakemake", "-n", "-q"], cwd=folder, env=common.environment(), **quiet)
    _, status, usage = os.wait4(process.pid, 0)  # unlike Popen.wait, it returns the resource usage
    if status:
        sys.exit(f"snakemake -n -q in {folder} failed with status {status}")
    return Run(time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


if __name__ == "__main__":
    sys.exit(main())
