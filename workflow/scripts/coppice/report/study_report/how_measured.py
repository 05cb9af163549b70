"""How a study was measured, as formatted text: protocols, tasks, versions, devices, seeds and fingerprints."""

import json
from collections.abc import Iterable, Mapping

from coppice.core.aliases import Record
from coppice.render import formatting
from coppice.stats import metrics

from .study_records import STAGES, Study


def measured(study: Study, metadata: Mapping[str, object]) -> Record:
    """Return how the study was measured: protocols, tasks, versions, devices, seeds, fingerprints, and `metadata`."""
    evaluations = [record for pair in study.pairs for stage in STAGES if (record := getattr(pair, stage))]
    others = [record for pair in study.pairs for record in (pair.training, pair.comparison) if record]
    return {
        "protocols": _protocols(evaluations),
        "tasks": _tasks(evaluations),
        "data": _data(evaluations),
        "versions": _distinct(evaluations + others, "versions"),
        "devices": sorted({str((record.get("provenance") or {}).get("device")) for record in evaluations + others}),
        "seeds": sorted({str((record.get("provenance") or {}).get("seed")) for record in evaluations + others}),
        "fingerprints": _fingerprints(evaluations),
        "metadata": [(key, value if isinstance(value, str) else plain_json(value)) for key, value in metadata.items()],
    }


def plain_json(value: object) -> str:
    """Return `value` as indented JSON; values that JSON lacks become strings."""
    return json.dumps(value, indent=1, ensure_ascii=False, default=str)


def _protocols(evaluations: Iterable[Record]) -> list[tuple[str, str]]:
    """Return one row per text and protocol; two rows for one text mean that its numbers cannot be compared."""
    rows = {}
    for record in evaluations:
        for name, text in (record.get("perplexity") or {}).items():
            # repr shows the line breaks that join documents
            facts = {key: repr(value) if key == "join" else value for key, value in text["protocol"].items()}
            rows[name, formatting.settings(facts)] = None
    return list(rows)


def _tasks(evaluations: Iterable[Record]) -> list[tuple[str, str, str]]:
    """Return one row per task, metric, number of items, version and engine in use."""
    rows = {}
    for record in evaluations:
        for name, task in (record.get("zero_shot") or {}).items():
            facts = {"n": task.get("n"), "version": task.get("version"), "engine": task.get("engine")}
            rows[name, task.get("metric"), formatting.settings(facts)] = None
    return list(rows)


def _data(evaluations: Iterable[Record]) -> list[tuple[str, str]]:
    """Return one row per metric of the user's own data sets, with its number of rows and how it was computed."""
    rows = {}
    for record in evaluations:
        for metric in metrics.found_in(record, metrics.OF_DATA):
            part = metric.part(record)
            facts = {"n": part.get("n")} | {key: part.get(key) for key in metric.alike}
            rows[metric.label, formatting.settings(facts)] = None
    return list(rows)


def _distinct(every: Iterable[Record], key: str) -> list[tuple[str, str]]:
    """Return (name, all values) for each entry under `key` in the records' provenance, such as library versions."""
    values = {}
    for record in every:
        for name, value in ((record.get("provenance") or {}).get(key) or {}).items():
            values.setdefault(name, {})[str(value)] = None
    return [(name, ", ".join(seen)) for name, seen in values.items()]


def _fingerprints(evaluations: Iterable[Record]) -> list[tuple[str, str]]:
    """Return (data set, all fingerprints) over the evaluations."""
    values = {}
    for record in evaluations:
        prints = ((record.get("provenance") or {}).get("fingerprints") or {}).get("datasets") or {}
        for name, value in prints.items():
            values.setdefault(name, {})[str(value)[:16]] = None
    return [(name, ", ".join(seen)) for name, seen in values.items()]
