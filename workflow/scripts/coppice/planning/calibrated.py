"""Tell whether pruned candidates can be kept although the record of their calibration data changes.

That record covers all rows of a data set. Pruning reads the train rows alone, so a change of the other rows must not
prune anything again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from coppice.core import fingerprints, records
from coppice.core.aliases import PathLike, Record
from coppice.study import local_files

if TYPE_CHECKING:
    from coppice.study.settings.resolved import StudyDataset

SOURCE = ("name", "revision", "format", "columns")


def train_rows(record: PathLike, entry: StudyDataset) -> str | None:
    """Return the fingerprint of the train rows of a data set, or None if they are not known or may change in this run.

    Args:
        record: path of its `dataset.json`.
        entry: its resolved settings, which decide what the next fetch reads. Of generated data nothing is known.
    """
    try:
        facts = records.read(record)
        source, train, made = facts["source"], facts["roles"]["train"], facts["provenance"]
        same = made["settings"]["splits"].get("train") == entry.splits.train
        same = same and source["path"] == (entry.source.path if entry.source.kind == "local" else entry.path)
        same = same and all(source[key] == getattr(entry, key) for key in SOURCE)
        if not same or (entry.format and _changed(entry, made["fingerprints"]["files"])):
            return None
        return train["fingerprint"]
    except (records.RecordError, KeyError, TypeError):
        return None


def _changed(entry: StudyDataset, digests: Mapping[str, str]) -> bool:
    """Return whether the local files of the train rows differ from the `digests` (file name -> digest) of a record."""
    files = local_files.files_of(entry.source.path, entry.format, entry.splits.train)
    return any(digests.get(file.name) != fingerprints.file_digest(file) for file in files)


def made_from(points: Mapping[PathLike, Record], recipe: Record, rows: str | None) -> bool:
    """Return whether candidates were pruned by this recipe with these train rows.

    The recipe is compared because Snakemake compares no parameters of a job if an earlier job of the run makes only
    `ancient` inputs of it: with an ancient input, a new setting would go unnoticed.

    Args:
        points: path of a candidate's `pruning.json` -> its point of the grid.
        recipe: {source, calibration, seed}, which they share; of `source` some keys are enough.
        rows: what `train_rows` returned.
    """
    return rows is not None and all(_made_from(path, recipe | {"point": point}, rows) for path, point in points.items())


def _made_from(pruning: PathLike, recipe: Record, rows: str) -> bool:
    try:
        facts = records.read(pruning)
        made = dict(facts["recipe"])
        made["source"] = {key: made["source"][key] for key in recipe["source"]}
        used = facts["provenance"]["fingerprints"]["calibration"]
        return (made, used) == (recipe, rows)
    except (records.RecordError, KeyError, TypeError):
        return False
