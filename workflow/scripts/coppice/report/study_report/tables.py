"""The tables of the report as pandas frames: one row a pair, one a task of a pair, one a candidate."""

from coppice.core import fingerprints, records
from coppice.study import layout

from .study_records import STAGES

# what a job is called -> the kind of record that it leaves
JOBS = {
    "prune": "candidate",
    "score candidates": "scores",
    "fine-tune": "training",
    "evaluate dense": "dense",
    "evaluate pruned": "pruned",
    "evaluate fine-tuned": "finetuned",
}


def comparisons(study):
    """One row a model and config: every metric at each stage, its change and what was recovered, with intervals."""
    import pandas

    rows = []
    for pair in study.pairs:
        facts = study.models[pair.model]
        row = {"model": pair.model, "config": pair.config, "family": facts["family"], "variant": facts["variant"]}
        row |= {"state": pair.state, "candidate": pair.candidate, "selected_by": _criterion(pair)}
        for stage in ("dense", "pruned"):
            row[f"parameters_{stage}"] = (getattr(pair, stage) or {}).get("parameters")
        for metric in study.metrics:
            row |= {f"{metric.key}_{stage}": value for stage, value in pair.values(metric).items()}
            known = pair.measured(metric) or {}
            row |= _bounded(f"{metric.key}_change", known.get("change"))
            row |= _bounded(f"{metric.key}_recovered", known.get("recovered"))
            row[f"{metric.key}_verdict"] = known.get("verdict")
        row["training_seconds"] = (pair.training or {}).get("seconds")
        rows.append(row)
    return pandas.DataFrame(rows)


def tasks(study):
    """One row a task of a compared pair: accuracy at each stage (shares of 1), change with interval, p-values."""
    import pandas

    columns = ["model", "config", "task", "metric", "n", *STAGES, *(f"change{end}" for end in ("", "_low", "_high"))]
    rows = [
        {"model": pair.model, "config": pair.config, "task": name, "metric": task["metric"], "n": task["n"]}
        | {stage: task[stage] for stage in STAGES}
        | _bounded("change", task["change"])
        | {key: task.get(key) for key in ("gained_items", "lost_items", "p", "p_holm", "verdict")}
        for pair in study.compared
        for name, task in pair.tasks.items()
    ]
    return pandas.DataFrame(rows, columns=[*columns, "gained_items", "lost_items", "p", "p_holm", "verdict"])


def candidates(study):
    """`candidates.tsv` of the selection, models of the study first in their order; empty where there is none.

    A table that cannot be read is noted as failed.
    """
    import pandas

    path = study.results / "candidates.tsv"
    empty = pandas.DataFrame(columns=["model", "candidate", "parameters", "chosen_as"])
    if not path.is_file():
        study.absent.append(("table of candidates", str(path)))
        return empty
    try:
        _check_seal(path)
        names = dict.fromkeys(("model", "candidate", "chosen_as"), str)
        frame = pandas.read_csv(path, sep="\t", dtype=names, keep_default_na=False, na_values=[""])
        frame["chosen_as"] = frame["chosen_as"].fillna("")
        order = {name: place for place, name in enumerate(study.models)}
        return frame.sort_values("model", key=lambda names: names.map(order), kind="stable", ignore_index=True)
    except (ValueError, KeyError, OSError, records.RecordError) as error:
        study.failed.append(("table of candidates", f"{path}: {error}"))
        return empty


def _check_seal(path):
    """Raise ValueError for a table that is not the one whose digest stands beside it."""
    seal = layout.seal_of(path)
    if seal.is_file() and records.read(seal)["sha256"] != fingerprints.content_digest(path):
        raise ValueError("was changed after it was written; delete it and run snakemake again")


def jobs(study):
    """One row a job that left a record: stage, seconds, and peak bytes of host and GPU memory."""
    import pandas

    rows = []
    places = [(stage, layout.root(kind), layout.RECORDS[kind][1]) for stage, kind in JOBS.items()]
    for stage, folder, name in (*places, ("compare", layout.root("finetuned"), layout.COMPARISON)):
        for path in sorted((study.results / folder).rglob(name)):
            record = _whole(path)
            provenance = record.get("provenance") or {}
            if provenance.get("seconds") is not None and not record.get("reused_from"):
                memory = provenance.get("peak_memory_bytes") or {}
                row = {"stage": stage, "job": str(path.parent.relative_to(study.results))}
                rows.append(
                    row | {"seconds": provenance["seconds"], "host": memory.get("host"), "gpu": memory.get("gpu")}
                )
    return pandas.DataFrame(rows, columns=["stage", "job", "seconds", "host", "gpu"])


def _whole(path):
    """The record at `path`, {} where it is damaged: the study's reading says so, if it is part of it."""
    try:
        return records.read(path)
    except (records.RecordError, ValueError):
        return {}


def _bounded(name, estimate):
    value = (estimate or {}).get("value")
    low, high = (estimate or {}).get("interval") or (None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _criterion(pair):
    criterion = (pair.selection or {}).get("criterion")
    return criterion["words"] if criterion else None
