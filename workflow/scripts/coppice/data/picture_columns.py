"""Take the pictures of a data set in: check every one of them, and write what identifies it into the rows.

Rows name pictures by paths, or carry their bytes. Either way a prepared row has a column `images`, a list of {path,
sha256, width, height}. Paths stay relative to the folder of the pictures; bytes are stored as files beside the rows.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coppice.core import records
from coppice.core.aliases import PathLike, Record
from coppice.core.errors import DataError

from . import picture_rows, pictures

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("coppice.data")

COLUMNS = ("images", "image")


@dataclass
class Intake:
    """The pictures of a data set.

    Attributes:
        name: of the data set.
        folder: of its prepared rows.
        roots: role -> the folder of its pictures, as dataset.json records it.
        problems: role, row and picture of each that cannot be used, with the reason.
        animated: the pictures of which only the first frame is used.
    """

    name: str
    folder: Path
    roots: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    animated: set[str] = field(default_factory=set)
    _found: dict[tuple[Path, str], tuple[Record, bool] | str] = field(default_factory=dict)

    def take(self, table: Dataset, role: str, root: PathLike | None) -> Dataset:
        """Return the rows of a role with their pictures in the column `images`, and the names of classes as labels.

        Rows without pictures are unchanged.

        root: the folder of pictures that rows name; None for a data set of the hub, whose rows carry them.
        """
        import datasets

        column = next((name for name in COLUMNS if name in table.column_names), None)
        if column is None:
            return table
        feature = table.features[column]
        inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)
        stored = isinstance(inner, datasets.Image) or (isinstance(inner, dict) and {"bytes", "path"} <= set(inner))
        if not stored and getattr(inner, "dtype", "") not in ("string", "large_string"):
            return table  # numbers, for instance: the column is not one of pictures
        if isinstance(inner, datasets.Image):
            raw = datasets.Image(decode=False)
            table = table.cast_column(column, raw if inner is feature else datasets.List(raw))
        place = self.folder / pictures.STORED if stored else Path(root or self.folder)
        self.roots[role] = pictures.STORED if stored else str(place.absolute())
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of is checked here
            cells = list(pool.map(lambda cell: self._cell(cell, place), table[column]))
        for row, cell in enumerate(cells):
            self.problems += [f"{role} row {row}: {found}" for found in cell if isinstance(found, str)]
        table = table.remove_columns([column])
        values = [[found for found in cell if not isinstance(found, str)] for cell in cells]
        kind = {"path": "string", "sha256": "string", "width": "int32", "height": "int32"}
        feature = datasets.List({key: datasets.Value(dtype) for key, dtype in kind.items()})
        return _with_names(table.add_column(picture_rows.COLUMN, values, feature=feature))

    def finish(self) -> list[str]:
        """Return notes for the record. Raise DataError, which names the pictures, if some cannot be used."""
        if self.problems:
            places = " and ".join(sorted(set(self.roots.values()) - {pictures.STORED}))
            relative = f" Paths are relative to {places} (datasets.{self.name}.image_root)." if places else ""
            raise DataError(
                f"datasets.{self.name}: {len(self.problems)} of its pictures cannot be used: "
                f"{pictures.named(self.problems)}. Rows count from 0. Correct the files, or remove the rows.{relative}"
            )
        if not self.animated:
            return []
        note = f"{len(self.animated)} pictures are animated or have several pages: their first frame is used"
        logger.warning("datasets.%s: %s: %s", self.name, note, ", ".join(sorted(self.animated)[:4]))
        return [note]

    def _cell(self, cell: object, root: Path) -> list[Record | str]:
        """Return for each picture of a cell what the row holds about it, or why it cannot be used."""
        found = []
        for value in cell if isinstance(cell, list) else [] if cell is None else [cell]:
            shown = (value if isinstance(value, str) else (value or {}).get("path")) or "a picture"
            try:
                facts, animated = self._taken(value, root)
            except pictures.Unusable as error:
                found.append(f"'{shown}' {error}")
                continue
            found.append(facts)
            if animated:
                self.animated.add(shown)
        return found

    def _taken(self, value: str | Mapping[str, Any] | None, root: Path) -> tuple[Record, bool]:
        content = None if isinstance(value, str) else (value or {}).get("bytes")
        if content is not None:
            return _store(content, root)
        path = value if isinstance(value, str) else (value or {}).get("path")
        if not path:
            raise pictures.Unusable("names no file")
        if (root, path) not in self._found:
            try:
                self._found[root, path] = pictures.facts_of(_inside(path, root), _read(root / path))
            except pictures.Unusable as error:
                self._found[root, path] = str(error)
        known = self._found[root, path]
        if isinstance(known, str):
            raise pictures.Unusable(known)
        return known


def _with_names(table: Dataset) -> Dataset:
    """Return the rows with the name of each class as `label`, if the source numbers the classes and lists their names.

    A model would otherwise read the numbers.
    """
    import datasets

    feature = table.features.get("label")
    if not isinstance(feature, datasets.ClassLabel):
        return table
    # rows without a label have -1 or nothing
    names = [None if number is None or number < 0 else feature.names[number] for number in table["label"]]
    return table.remove_columns("label").add_column("label", names, feature=datasets.Value("string"))


def root_of(entry: Record, files: Iterable[Path]) -> Path | None:
    """Return the folder of the pictures that the rows of some data files name; None for a data set of the hub."""
    if entry.get("image_root"):
        return Path(entry["image_root"]).expanduser().absolute()
    return next((file.parent for file in files), None)


def _inside(path: str, root: Path) -> str:
    """Return a path relative to `root`. Symbolic links are followed: only the path's own text is checked."""
    if "://" in path:
        raise pictures.Unusable("is an address on the network; download it")
    relative = os.path.relpath(os.path.normpath(root / path), os.path.normpath(root))
    if relative.split(os.sep)[0] == os.pardir:
        raise pictures.Unusable("lies outside the folder of the images")
    return relative


def _read(path: Path) -> bytes:
    if not path.exists():
        raise pictures.Unusable("is missing")
    if not path.is_file():
        raise pictures.Unusable("is not a file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise pictures.Unusable(f"cannot be read ({error.strerror})") from error


def _store(content: bytes, root: Path) -> tuple[Record, bool]:
    """Write a picture to a file that is named by its digest; return what the row holds about it."""
    facts, animated = pictures.facts_of("", content)
    path = root / facts["sha256"][:2] / facts["sha256"]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with records.atomic(path, "wb") as file:
            file.write(content)
    return facts | {"path": str(path.relative_to(root))}, animated
