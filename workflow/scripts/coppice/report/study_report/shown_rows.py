"""Show what the three stages of a pair answered to the first rows of each data set, beside the rows' pictures.

Answers and references come from the evaluations' samples. Questions and pictures come from the prepared data set whose
rows were evaluated, if it is still there.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from coppice.core import fingerprints, records
from coppice.core.aliases import PathLike, Record
from coppice.core.errors import CoppiceError
from coppice.stats import metrics, stored_samples

from .study_records import STAGES, Pair

if TYPE_CHECKING:
    from coppice.data.pictures import Picture

ROWS = 4  # shown of each data set
READ = 64  # rows of a data set that are searched for distinct pictures
SIDE = 160  # pixels of the longer side of a picture on the page
SMALL = 96  # up to this many pixels a picture is not compressed: it is a drawing or an icon
LONGEST = 400  # characters of a question
COLUMNS = ("doc_id", "doc_hash", "answer", "prediction", "references", "label", "rank")
QUESTIONS = ("question", "prompt", "instruction", "input")


@dataclass
class DataSets:
    """The prepared data sets of a study, by the fingerprints of their rows.

    Attributes:
        roles: fingerprint of rows -> (dataset.json, role).
        first: fingerprint -> the first rows, read once.
    """

    roles: dict[str, tuple[Path, str]] = field(default_factory=dict)
    first: dict[str, list[Record]] = field(default_factory=dict)

    def rows(self, fingerprint: str | None) -> list[Record]:
        """Return the first rows with this fingerprint, with their `Picture`s as `pictures`; [] if they are not there.

        Rows of captions of one picture are one row.
        """
        if fingerprint not in self.roles:
            return []
        if fingerprint not in self.first:
            self.first[fingerprint] = _first_rows(*self.roles[fingerprint])
        return self.first[fingerprint]


def data_sets(results: PathLike) -> DataSets:
    """Return the data sets that the evaluations under `results` used and that are still there."""
    found = DataSets()
    for listing in sorted((Path(results) / ".gathered").rglob("*.json")):
        for name in _listed(listing):
            path = Path(name)
            if path.name == "dataset.json" and path.is_file():
                roles = _read(path).get("roles") or {}
                found.roles |= {facts.get("fingerprint"): (path, role) for role, facts in roles.items()}
    return found


def _listed(listing: Path) -> Sequence[str]:
    return list(_read(listing).get("files") or ())


def _read(path: Path) -> Record:
    """Return a record, or {} if it is damaged: the page then lacks pictures, but no number."""
    try:
        return records.read(path)
    except (records.RecordError, ValueError):
        return {}


def _first_rows(record: Path, role: str) -> list[Record]:
    import pyarrow
    from pyarrow import parquet

    from coppice.data import pictures

    facts, path = _read(record)["roles"][role], record.parent / f"{role}.parquet"
    try:
        if fingerprints.content_digest(path) != facts.get("sha256"):
            return []
        with parquet.ParquetFile(path) as file:
            rows = next(file.iter_batches(batch_size=READ), pyarrow.RecordBatch.from_pylist([])).to_pylist()
    except (OSError, ValueError):
        return []
    album = pictures.Album(pictures.root_of(record, role), None)
    return [row | {"pictures": album.of_row(row)} for row in rows]


def of_pair(pair: Pair, data: DataSets) -> list[Record]:
    """Return one entry per data set that a pair's stages answered rows of, found pictures in or classified.

    Returns:
        [{dataset, rows: [{question, references, pictures: [data URI], answers: {stage: text}}]}]
    """
    compared = metrics.found_in(pair.comparison or {}, metrics.OF_DATA)
    names = dict.fromkeys((metric.name, metric.samples) for metric in compared)
    found = ({"dataset": name, "rows": _rows(pair, name, samples, data)} for name, samples in names)
    return [entry for entry in found if entry["rows"]]


def _rows(pair: Pair, name: str, samples: str, data: DataSets) -> list[Record]:
    """Return the first rows of a data set with the answers of all stages; [] if the stages have other rows."""
    try:
        tables = [stored_samples.samples(pair.folders[stage], samples, COLUMNS).slice(0, ROWS) for stage in STAGES]
    except records.RecordError:
        return []
    if not all(table["doc_hash"].equals(tables[0]["doc_hash"]) for table in tables):
        return []
    prints = ((pair.dense or {}).get("provenance") or {}).get("fingerprints") or {}
    rows = data.rows((prints.get("datasets") or {}).get(name))
    answered = zip(*(table.to_pylist() for table in tables), strict=True)
    return [row for each in answered if (row := _row(each, samples, rows))]


def _row(stages: Sequence[Record], samples: str, rows: Sequence[Record]) -> Record | None:
    """Return what the page shows of one row, or None if the stages answered nothing that can be read."""
    first = stages[0]
    is_ranked = "answer" not in first and "prediction" not in first
    if is_ranked:  # of pictures that find captions; a caption that finds pictures has no text in the samples
        rows = _by_picture(rows) if samples.endswith(f".{metrics.DIRECTIONS[0]}") else []
    own = rows[first["doc_id"]] if first["doc_id"] < len(rows) else {}
    if is_ranked and not own:
        return None
    references = first.get("references") or ([first["label"]] if first.get("label") else _captions(own))
    return {
        "question": question(own),
        "references": [str(one) for one in references],
        "pictures": [uri for one in own.get("pictures") or () if (uri := thumbnail(one))],
        "answers": {stage: _said(row) for stage, row in zip(STAGES, stages, strict=True)},
    }


def _said(row: Record) -> str:
    said = row.get("answer", row.get("prediction"))
    return f"a right caption has rank {row['rank']}" if said is None else str(said)


def _by_picture(rows: Sequence[Record]) -> list[Record]:
    """Return rows of pictures with captions, one for each picture, with the captions of all its rows."""
    found: dict[str, Record] = {}
    for row in rows:
        for picture in row["pictures"]:
            own = found.setdefault(picture.sha256, {"pictures": [picture], "captions": []})
            own["captions"] += _captions(row)
    return list(found.values())


def _captions(row: Mapping[str, object]) -> list[str]:
    captions = row.get("captions")
    return list(captions) if captions is not None else [row["caption"]] if row.get("caption") else []


def question(row: Mapping[str, object]) -> str:
    """Return the text that a row asks, shortened; "" if it has none."""
    if row.get("prefix") is not None:  # code with a gap
        before, after = str(row["prefix"]), str(row.get("suffix") or "")
        return f"{before[-LONGEST // 2 :]}[…]{after[: LONGEST // 4]}"
    turns = [turn for turn in row.get("messages") or () if turn.get("role") == "user"]
    text = _text(turns[-1].get("content")) if turns else next((row[key] for key in QUESTIONS if row.get(key)), "")
    text = str(text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _text(content: object) -> str:
    """Return the text of a message, which may be a list of typed parts."""
    if isinstance(content, list):
        return " ".join(part.get("text") or "" for part in content if isinstance(part, dict)).strip()
    return str(content or "")


def thumbnail(picture: Picture) -> str | None:
    """Return a picture as a data URI, scaled down; None if the file is missing or was changed."""
    try:
        image = picture.open()
    except (CoppiceError, ValueError, OSError):
        return None
    kind = "png" if max(image.size) <= SMALL else "jpeg"
    image.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    image.save(content, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
