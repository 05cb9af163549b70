"""Measure how well Snakemake, with the rules' priorities, keeps GPUs busy over a study of 6 models x 2 configs.

The benchmark takes DAG, resources and priorities from a dry run and replays them with jobs that sleep, on 1, 2, 4 and 8
GPUs. The full-size study uses the job lengths that `coppice plan` estimates; with `--study`, a finished miniature study
is replayed too, with the lengths that its jobs took. The makespan of the order that Snakemake chose, without its
start-up time, is compared with the best of several list schedules that know all lengths in advance.

    python benchmarks/makespan.py --check --study . --json makespan.json
"""

from __future__ import annotations

import argparse
import heapq
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import common

if TYPE_CHECKING:
    from coppice.core.aliases import Record

BAR = 1.10
TFLOPS = 300
STAGES = {
    "prune_candidate": "prune",
    "score_candidate": "score",
    "evaluate_dense": "dense",
    "link_pruned": "pruned",
    "link_training": "finetune",
    "link_finetuned": "finetuned",
}
# Before the configs have chosen, a dry run lists only the jobs that link the results of the chosen candidates. They
# stand here for the jobs that make these results: rule -> (logs of those jobs, their priority)
STAND_INS = {
    "link_pruned": ("evaluate/pruned.", 0),
    "link_training": ("finetune/", 60),
    "link_finetuned": ("evaluate/finetuned.", 30),
}
BRIEF = 1.5  # seconds assumed for a job without a benchmark file, which only reads and writes records


@dataclass
class Job:
    """A job of the plan. `needs` holds the numbers of the jobs it waits for, `length` its seconds."""

    rule: str
    wildcards: dict[str, str]
    inputs: list[str]
    outputs: list[str]
    benchmark: str | None
    gpus: int
    priority: int
    needs: set[int] = field(default_factory=set)
    length: float = 0.0


def main() -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a ratio is above its bar")
    parser.add_argument("--json", metavar="FILE", help="write all results to this file")
    parser.add_argument("--study", metavar="FOLDER", help="checkout with a finished miniature study to replay as well")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of GPUs")
    parser.add_argument(
        "--seconds", type=float, default=60, help="approximate length of a replay (default: %(default)s)"
    )
    arguments = parser.parse_args()
    studies = {"full size": estimated()}
    if arguments.study:
        studies["miniature"] = measured(Path(arguments.study))
    results = {}
    for name, jobs in studies.items():
        for gpus in arguments.gpus:
            results[f"{name}, {gpus} GPU"] = compare(jobs, gpus, arguments.seconds)
            print(f"{name}, {gpus} GPU: done", file=sys.stderr, flush=True)
    return common.conclude(results, arguments, above_bar, show, summary)


def above_bar(name: str, result: Record) -> list[str]:
    """Return a sentence if the ratio is above its bar."""
    return [f"{name}: {result['ratio']:.3f} > {BAR}"] if result["ratio"] > BAR else []


def show(name: str, result: Record) -> None:
    """Print one replay on a line."""
    print(
        f"{name:18} {result['jobs']:4} jobs  chosen {result['chosen']:8.1f}  best known {result['best']:8.1f}  "
        f"bound {result['bound']:8.1f}  ratio {result['ratio']:.3f}  (replayed in {result['wall']:.0f} s)"
    )


def summary(results: Mapping[str, Record], failures: Sequence[str]) -> str:
    """Return the last line of the output."""
    worst = max(result["ratio"] for result in results.values())
    return (
        f"makespan: at most {worst:.3f} times the best known schedule over {len(results)} replays, bar {BAR}; "
        f"{'FAIL' if failures else 'pass'}"
    )


def estimated() -> list[Job]:
    """Return the jobs of the full-size study, with the lengths that `coppice plan` estimates.

    Jobs that only read records take no time.
    """
    from snakemake.common.configfile import load_configfile
    from snakemake.utils import update_config

    from coppice.planning import plan
    from coppice.study import settings

    files = [common.ROOT / "config/config.yaml", common.ROOT / "config/full.yaml"]
    config = load_configfile(files[0])
    update_config(config, load_configfile(files[1]))
    lengths = {}
    for model in config["models"]:
        study = settings.load(config | {"only": {"models": [model], "configs": None}}, [str(file) for file in files])
        lengths |= {(stage.name, model): stage.longest for stage in plan.plan(study, TFLOPS).stages}
    jobs = planned("--configfile", "config/full.yaml")
    for job in jobs:
        job.length = lengths.get((STAGES.get(job.rule), job.wildcards.get("model")), 0.0)
    return jobs


def measured(study: Path) -> list[Job]:
    """Return the jobs of the miniature study in the folder `study`, with the seconds that each took there."""
    jobs = planned()
    places = {(job.rule, *job.wildcards.values()): number for number, job in enumerate(jobs)}
    for job in jobs:
        record = linked(study, job)
        if record.get("reused_from"):
            job.gpus, job.length = 0, BRIEF
            first = job.wildcards | {"config": record["reused_from"]}
            job.needs.add(places[job.rule, *first.values()])
            continue
        if record:
            job.benchmark = f"logs/{STAND_INS[job.rule][0]}{record['model']}.{record['candidate']}.benchmark.tsv"
        lines = (study / job.benchmark).read_text().splitlines() if job.benchmark else None
        job.length = float(lines[1].split("\t")[0]) if lines else BRIEF
    return jobs


def linked(study: Path, job: Job) -> Record:
    """Return the record of a config that a stand-in links in the finished study; {} for other jobs."""
    if job.rule not in STAND_INS:
        return {}
    record = next(path for path in job.outputs if path.endswith(("finetuning_config.json", "evaluation_results.json")))
    return json.loads((study / record).read_text())


def planned(*words: str) -> list[Job]:
    """Return the `Job`s of a dry run, with `needs` filled in."""
    with tempfile.TemporaryDirectory() as folder:
        common.checkout(folder)
        (Path(folder) / "config").symlink_to(common.ROOT / "config")
        text = common.snakemake(folder, "-n", *words).stdout
    jobs = [job(block) for block in re.split(r"\n(?=(?:local)?(?:rule|checkpoint) \w+:\n)", text)[1:]]
    makers = {path: number for number, one in enumerate(jobs) for path in one.outputs}
    trainings = {
        tuple(one.wildcards.values()): number for number, one in enumerate(jobs) if one.rule == "link_training"
    }
    for one in jobs:
        one.needs = {makers[path] for path in one.inputs if path in makers}
        if one.rule == "link_finetuned":
            one.needs.add(trainings[tuple(one.wildcards.values())])
    return jobs


def job(block: str) -> Job:
    """Parse one paragraph of a dry run's output and return its `Job`."""
    facts = dict(re.findall(r"^    (\w+): (.*)$", block, re.MULTILINE))
    resources = dict(word.split("=") for word in facts.get("resources", "").split(", ") if "=" in word)
    rule = re.search(r"(?:rule|checkpoint) (\w+):", block)[1]
    return Job(
        rule=rule,
        wildcards=dict(word.split("=") for word in facts.get("wildcards", "").split(", ") if "=" in word),
        inputs=facts.get("input", "").split(", "),
        outputs=facts["output"].split(", ") if "output" in facts else [],
        benchmark=facts.get("benchmark"),
        gpus=1 if rule in STAND_INS else int(resources.get("gpu", 0)),
        priority=STAND_INS[rule][1] if rule in STAND_INS else int(facts.get("priority", 0)),
    )


def compare(jobs: Sequence[Job], gpus: int, seconds: float) -> Record:
    """Return the makespans on `gpus` devices, in the unit of the jobs' lengths: Snakemake's and the best known one."""
    tails = bottom_levels(jobs)
    everyone = range(len(jobs))
    orders = {
        "critical path": sorted(everyone, key=lambda n: -tails[n]),
        "longest": sorted(everyone, key=lambda n: -jobs[n].length),
        "priority, critical path": sorted(everyone, key=lambda n: (-jobs[n].priority, -tails[n])),
    }
    schedules = {name: schedule(jobs, order, gpus) for name, order in orders.items()}
    scale = seconds / min(schedules.values())
    spans, wall = replay(jobs, gpus, scale)
    chosen = chosen_makespan(jobs, spans, gpus)
    best = min(*schedules.values(), chosen)
    # No schedule beats the total work over all GPUs, nor the longest chain of jobs.
    work = sum(one.length for one in jobs if one.gpus) / gpus
    return {
        "jobs": len(jobs),
        "chosen": chosen,
        "best": best,
        "ratio": chosen / best,
        "bound": max(work, max(tails)),
        "wall": wall,
        "known": schedules,
    }


def bottom_levels(jobs: Sequence[Job]) -> list[float]:
    """Return for each job the length of the longest path from its start to the end of the study."""
    users = [[] for _ in jobs]
    for number, one in enumerate(jobs):
        for need in one.needs:
            users[need].append(number)
    tails = [None] * len(jobs)

    def tail(number: int) -> float:
        if tails[number] is None:
            tails[number] = jobs[number].length + max(map(tail, users[number]), default=0.0)
        return tails[number]

    return [tail(number) for number in range(len(jobs))]


def schedule(jobs: Sequence[Job], order: Sequence[int], gpus: int) -> float:
    """Return the makespan of list scheduling: each job that is ready and fits starts at once, in `order`."""
    waiting, running, now, free, ended = list(order), [], 0.0, gpus, set()
    while waiting or running:
        for number in list(waiting):
            if jobs[number].needs <= ended and jobs[number].gpus <= free:
                waiting.remove(number)
                free -= jobs[number].gpus
                heapq.heappush(running, (now + jobs[number].length, number))
        now, number = heapq.heappop(running)
        ended.add(number)
        free += jobs[number].gpus
    return now


def replay(jobs: Sequence[Job], gpus: int, scale: float) -> tuple[dict[int, tuple[float, float]], float]:
    """Let Snakemake run the jobs as sleeps; return (job -> (start, end) by the clock, wall seconds of the run)."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "Snakefile").write_text("\n".join(rules(jobs, scale)))
        started = time.monotonic()
        common.snakemake(folder, "--cores", "64", "--resources", f"gpu={gpus}", "--scheduler", "greedy")
        wall = time.monotonic() - started
        lines = [Path(folder, f"{number}.txt").read_text().split() for number in range(len(jobs))]
    return {number: (float(start), float(end)) for number, (start, end) in enumerate(lines)}, wall


def rules(jobs: Sequence[Job], scale: float) -> Iterator[str]:
    """Yield the lines of a Snakefile with one rule per job."""
    yield f"rule all:\n    input: {[f'{number}.txt' for number in range(len(jobs))]}"
    for number, one in enumerate(jobs):
        needs = [f"{need}.txt" for need in sorted(one.needs)]
        yield f"rule j{number}:\n    input: {needs}\n    output: '{number}.txt'\n    priority: {one.priority}"
        yield f"    resources: gpu={one.gpus}"
        words = f"start=$(date +%s.%N); sleep {one.length * scale:.4f}; echo $start $(date +%s.%N) > {{output}}"
        yield f"    shell: '{words}'"


def chosen_makespan(jobs: Sequence[Job], spans: Mapping[int, tuple[float, float]], gpus: int) -> float:
    """Return the makespan of the order that Snakemake chose, without its own delays between jobs.

    Each job takes the device that became free first and starts at once, whereas in the replay it may have waited for
    Snakemake.
    """
    devices, ended = [(0.0, 0.0)] * gpus, {}  # when each device became free: in the replay, and without delays
    for number, (_, end) in sorted(spans.items(), key=lambda item: item[1]):
        one = jobs[number]
        start = max((ended[need] for need in one.needs), default=0.0)
        used = [heapq.heappop(devices) for _ in range(one.gpus)]
        ended[number] = max(start, *(free for _, free in used), 0.0) + one.length
        for _ in used:
            heapq.heappush(devices, (end, ended[number]))
    return max(ended.values())


if __name__ == "__main__":
    sys.exit(main())
