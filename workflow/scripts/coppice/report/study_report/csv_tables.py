"""Build the tables that the report writes as CSV, as pandas frames: comparisons, tasks, candidates and jobs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from coppice.core import fingerprints, records
from coppice.core.aliases import Estimate, Record
from coppice.stats import metrics
from coppice.study import layout

from .study_records import STAGES, Pair, Study

if TYPE_CHECKING:
    import pandas

# A job's name in the figure of time and memory -> the kind of record that the job writes (`layout.RECORDS`).
JOBS = {
    "prune": "candidate",
    "score candidates": "scores",
    "fine-tune": "training",
    "evaluate dense": "dense",
    "evaluate pruned": "pruned",
    "evaluate fine-tuned": "finetuned",
}


def comparisons(study: Study) -> pandas.DataFrame:
    """Return one row per model and config: every metric at each stage, its change and its recovered share."""
    import pandas

    rows = []
    for pair in study.pairs:
        facts = study.models[pair.model]
        row = {"model": pair.model, "config": pair.config, "family": facts["family"], "variant": facts["variant"]}
        row |= {"state": pair.state, "candidate": pair.candidate, "selected_by": _criterion(pair)}
        for stage in ("dense", "pruned"):
            row[f"parameters_{stage}"] = (getattr(pair, stage) or {}).get("parameters")
            row[f"zeros_{stage}"] = ((getattr(pair, stage) or {}).get("sparsity") or {}).get("share")
        for metric in study.metrics:
            row |= {f"{metric.key}_{stage}": value for stage, value in pair.values(metric).items()}
            compared = pair.measured(metric) or {}
            row |= _bounded(f"{metric.key}_change", compared.get("change"))
            row |= _bounded(f"{metric.key}_recovered", compared.get("recovered"))
            row[f"{metric.key}_verdict"] = compared.get("verdict")
        row["training_seconds"] = (pair.training or {}).get("seconds")
        rows.append(row)
    return pandas.DataFrame(rows)


def tasks(study: Study) -> pandas.DataFrame:
    """Return one row per task of a compared pair: accuracy at each stage (0 to 1), change with interval, p-values.

    Other metrics whose rows are right or wrong have rows, too: their task is the data set.
    """
    import pandas

    columns = ["model", "config", "task", "metric", "n", *STAGES, *(f"change{end}" for end in ("", "_low", "_high"))]
    rows = [
        {"model": pair.model, "config": pair.config, "task": metric.name}
        | {"metric": task.get("metric", metric.section), "n": task["n"]}
        | {stage: task[stage] for stage in STAGES}
        | _bounded("change", task["change"])
        | {key: task.get(key) for key in ("gained_items", "lost_items", "p", "p_holm", "verdict")}
        for pair in study.compared
        for metric in metrics.details_in(pair.comparison)
        if metric.right_or_wrong and (task := metric.part(pair.comparison))
    ]
    return pandas.DataFrame(rows, columns=[*columns, "gained_items", "lost_items", "p", "p_holm", "verdict"])


def candidates(study: Study) -> pandas.DataFrame:
    """Return `candidates.tsv`, sorted by the study's order of models.

    If the file is missing or damaged, return an empty table and add it to the study's missing or failed records.
    """
    import pandas

    path = study.results / "candidates.tsv"
    empty = pandas.DataFrame(columns=["model", "candidate", "parameters", "chosen_as"])
    if not path.is_file():
        study.absent.append(("table of candidates", str(path)))
        return empty
    try:
        _check_seal(path)
        # A model or candidate may be called "001" or "nan": pandas must read names as text.
        names = dict.fromkeys(("model", "candidate", "chosen_as"), str)
        frame = pandas.read_csv(path, sep="\t", dtype=names, keep_default_na=False, na_values=[""])
        frame["chosen_as"] = frame["chosen_as"].fillna("")
        order = {name: place for place, name in enumerate(study.models)}
        return frame.sort_values("model", key=lambda names: names.map(order), kind="stable", ignore_index=True)
    except (ValueError, KeyError, OSError, records.RecordError) as error:
        study.failed.append(("table of candidates", f"{path}: {error}"))
        return empty


def _check_seal(path: Path) -> None:
    """Raise ValueError if the table differs from the digest recorded beside it."""
    seal = layout.seal_of(path)
    if seal.is_file() and records.read(seal)["sha256"] != fingerprints.content_digest(path):
        raise ValueError("this table was edited after the run wrote it; delete it and run snakemake again")


def jobs(study: Study) -> pandas.DataFrame:
    """Return one row per job with a record: stage, seconds, and peak host and GPU memory in bytes."""
    import pandas

    rows = []
    places = [(stage, layout.root(kind), layout.RECORDS[kind][1]) for stage, kind in JOBS.items()]
    for stage, folder, name in (*places, ("compare", layout.root("finetuned"), layout.COMPARISON)):
        for path in sorted((study.results / folder).rglob(name)):
            record = _record_or_empty(path)
            provenance = record.get("provenance") or {}
            # A reused result repeats the time and memory of the job that computed it; count that job once.
            if provenance.get("seconds") is not None and not record.get("reused_from"):
                memory = provenance.get("peak_memory_bytes") or {}
                row = {"stage": stage, "job": str(path.parent.relative_to(study.results))}
                rows.append(
                    row | {"seconds": provenance["seconds"], "host": memory.get("host"), "gpu": memory.get("gpu")}
                )
    return pandas.DataFrame(rows, columns=["stage", "job", "seconds", "host", "gpu"])


def _record_or_empty(path: Path) -> Record:
    """Return the record at `path`, or {} if it is damaged, which `study_records.read` already reports."""
    try:
        return records.read(path)
    except (records.RecordError, ValueError):
        return {}


def _bounded(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    """Return the columns {name}, {name}_low and {name}_high of an estimate with its interval."""
    value = (estimate or {}).get("value")
    low, high = (estimate or {}).get("interval") or (None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _criterion(pair: Pair) -> str | None:
    """Return the selection criterion in words, or None."""
    criterion = (pair.selection or {}).get("criterion")
    return criterion["words"] if criterion else None
