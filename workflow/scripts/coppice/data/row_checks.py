"""Check that the rows of a prepared dataset hold what their use needs: columns, text, and right answers of tasks."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from coppice.core.aliases import Record
from coppice.core.errors import DataError
from coppice.models import kinds

from . import picture_rows, prompts

if TYPE_CHECKING:
    from datasets import Dataset

TASK_COLUMNS = {
    "boolq": ("question", "passage", "label"),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "arc_easy": ("question", "choices", "answerKey"),
    "arc_challenge": ("question", "choices", "answerKey"),
    "openbookqa": ("question_stem", "choices", "answerKey"),
}
TRUTHS = ("label", lambda row: (0, 1))
KEYS = ("answerKey", lambda row: row["choices"]["label"])


# use of rows -> the kinds of rows that it can read
ROWS_OF = {
    "training": tuple(prompts.KINDS),
    "answers": tuple(prompts.KINDS),
    "retrieval": ("image-caption",),
    "classification": ("image-label",),
}
# columns of training rows that hold no text
NOT_TEXT = ("messages", "conversations", "image", "images", "label")


def _ending_numbers(row: Record) -> list[int | str]:
    numbers = range(len(row["endings"]))
    return [*numbers, *map(str, numbers)]


# task -> (column of right answers, row -> valid values). lm-eval silently counts a row with another value as wrong.
ANSWERS = {
    "boolq": TRUTHS,
    "piqa": TRUTHS,
    "hellaswag": ("label", _ending_numbers),
    "winogrande": ("answer", lambda row: ("1", "2")),
    "arc_easy": KEYS,
    "arc_challenge": KEYS,
    "openbookqa": KEYS,
}


def check_columns(name: str, table: Dataset, role: str, uses: Collection[str], required: Collection[str]) -> None:
    """Raise DataError if a column does not hold what its use needs, or a row lacks a value."""
    complete = {column: False for column in required}  # columns without empty cells -> True if they must hold text
    if "text" in uses:
        complete["text"] = True
    for column, is_text in complete.items():
        if column not in table.column_names:
            raise DataError(
                f"datasets.{name}: its {role} rows lack the column {column} (they have "
                f"{', '.join(table.column_names)}). Map it with datasets.{name}.columns."
            )
        cells = table.data.column(column)
        if cells.null_count:
            empty = cells.is_null().index(True).as_py()
            raise DataError(f"datasets.{name}: row {empty} of its {role} rows (from 0) has no {column}. Fill it in.")
        if is_text:
            _check_is_text(name, table, column)
    for accepted in _accepted(uses, role):
        _check_row_kind(name, table, role, accepted)


def check_pictures(name: str, table: Dataset, role: str, uses: Collection[str]) -> None:
    """Raise DataError if a row about a picture has none, or if its text marks another number of pictures.

    Without a picture, a model would answer without seeing anything. Chats need none: data sets mix those about pictures
    with others.
    """
    for accepted in _accepted(uses, role):
        kind = prompts.kind_of(table.column_names, name, accepted)
        if not kind.startswith("image-"):
            continue
        # a column called image that holds no pictures stays what it is
        for place, row in enumerate(table if picture_rows.COLUMN in table.column_names else [{}]):
            where, pictures = f"datasets.{name}: row {place} of its {role} rows (from 0)", picture_rows.digests(row)
            if not pictures and kind not in prompts.CHATS:
                raise DataError(f"{where} has no picture. Name one in its column image, or remove the row.")
            if kind in ("image-chat", "image-answer"):
                picture_rows.marked(_asked(row, kind, where), len(pictures), where)


def _asked(row: Record, kind: str, where: str) -> list[picture_rows.Turn]:
    """Return the turns of a row about pictures; of a row that is no chat, its question."""
    if kind not in prompts.CHATS:
        return [{"role": "user", "content": picture_rows.question(row)}]
    try:
        return picture_rows.conversation(row)
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{where}: its chat has the wrong form ({error!r}). Correct the row.") from error


def _accepted(uses: Collection[str], role: str) -> list[tuple[str, ...]]:
    """Return the kinds of rows that can be read, for each use of a role's rows as rows, and not as text or tasks.

    uses: purposes, maybe with a colon and the kind of model that reads the rows.
    """
    found = {}
    for use in uses:
        purpose, _, kind = use.partition(":")
        if purpose in ROWS_OF and (purpose == "training") == (role == "train"):
            found[kinds.named(kind).row_kinds if kind else ROWS_OF[purpose]] = None
    return list(found)


def _check_row_kind(name: str, table: Dataset, role: str, accepted: Sequence[str]) -> None:
    """Raise DataError if rows that models learn from or are measured on do not hold text, or if an answer is empty.

    Training leaves out rows of one answer without it, and counts them.

    Args:
        name: of the data set.
        table: its rows.
        role: their role.
        accepted: the kinds of rows that their use can read.
    """
    kind = prompts.kind_of(table.column_names, name, accepted)
    *asked, answered = [[column for column in group if column in table.column_names] for group in prompts.KINDS[kind]]
    # a row of this kind may have several answers, as a list
    several = len(prompts.KINDS[kind][-1]) > 1 and kind not in prompts.CHATS
    for column in itertools.chain(*asked, answered):
        if column not in NOT_TEXT:
            _check_is_text(name, table, column, lists=several and column in answered)
    compared = role != "train" and kind != "text"  # an answer is compared with each of these rows
    for place, row in enumerate(table.select_columns(answered) if several or compared else ()):
        listed = [answer for cell in row.values() if isinstance(cell, list) for answer in cell]
        found = _labels(row) if kind == "image-label" else prompts.references(row, kind)
        if not found or not all((answer or "").strip() for answer in listed):
            raise DataError(
                f"datasets.{name}: row {place} of its {role} rows (from 0) has an empty {' or '.join(answered)}. Fill "
                "it in, or remove the row."
            )


def _labels(row: Record) -> list[str]:
    return [] if row["label"] is None or not str(row["label"]).strip() else [str(row["label"])]


def check_answers(name: str, table: Dataset, role: str, required: Collection[str]) -> None:
    """Raise DataError if a row of one of the seven tasks does not name one of its choices as the right one."""
    if not required or name not in ANSWERS or role == "train":
        return
    column, valid = ANSWERS[name]
    for place, row in enumerate(table.select_columns(list(required))):
        where = f"datasets.{name}: row {place} of its {role} rows (from 0)"
        try:
            found = list(valid(row))
        except (TypeError, KeyError) as error:
            raise DataError(f"{where}: the choices have the wrong form ({error!r}). Correct the row.") from error
        # lm-eval strips OpenBookQA's answers on the left, so leading spaces are allowed.
        answer = row[column].lstrip() if isinstance(row[column], str) else row[column]
        if answer not in found or isinstance(answer, float):
            raise DataError(
                f"{where}: {column} is {row[column]!r}, which is not one of {', '.join(map(repr, found))}. Public test "
                "splits are unlabeled: name another split or correct the answers."
            )


def _check_is_text(name: str, table: Dataset, column: str, lists: bool = False) -> None:
    """Raise DataError if a column does not hold text or, if `lists`, neither texts nor lists of texts."""
    feature = table.features[column]
    kind = getattr(getattr(feature, "feature", feature) if lists else feature, "dtype", "lists or mappings")
    if kind not in ("string", "large_string"):
        raise DataError(f"datasets.{name}: the column {column} holds {kind}, but must hold text. Convert it.")
