"""Read the rows of one role of a prepared data set as a model reads them: for training, or to be asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from coppice.core.aliases import PathLike
from coppice.models.rows import Row

from . import datasets, prompts

if TYPE_CHECKING:
    from coppice.models import Reader


class RowSource:
    """The rows of one role of a data set.

    Attributes:
        name: of the data set.
        rows: their columns.
        kind: the kind of the rows, a key of `prompts.KINDS`.
    """

    def __init__(
        self, name: str, record: PathLike, role: str, prompt: str, reader: Reader, kinds: Sequence[str]
    ) -> None:
        """Read the rows.

        Args:
            name: of the data set.
            record: its dataset.json.
            role: train, selection or report.
            prompt: prompt format: alpaca, chat or none.
            reader: of the model.
            kinds: the kinds of rows that the model takes.

        Raises:
            DataError: the columns fit none of the kinds.
        """
        from . import pictures  # imports Pillow, which planning a study does not need

        self.name, table = name, datasets.load(record, role)
        self.role = "" if role == "train" else f"{role} "
        self.rows, self.kind = table.to_list(), prompts.kind_of(table.column_names, name, kinds)
        self._format = prompts.Formatter(self.kind, prompt, reader.tokenizer, pictures.album(record, role, reader))

    def to_learn(self, index: int) -> list[Row]:
        """Return a row as it is trained on: once for each of its right answers."""
        return self._format.rows(self.rows[index], self._where(index))

    def to_ask(self, index: int) -> Row:
        """Return a row as a model is asked it, with all of its right answers."""
        return self._format.question(self.rows[index], self._where(index))

    def asked(self, limit: int | None) -> list[Row]:
        """Return the first `limit` rows, or all of them, to be asked.

        Raises:
            DataError: a row has no answer to compare with, or cannot be read.
        """
        return [self.to_ask(index) for index in range(len(self.rows))[:limit]]

    def _where(self, index: int) -> str:
        return f"dataset {self.name}, {self.role}row {index}"
