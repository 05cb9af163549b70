"""Draw the data on which importance is measured: windows of contiguous tokens, as the references have it, or rows.

GPTQ, SparseGPT and Wanda cut windows at random places out of WikiText2, whose rows are the lines of one text, and out
of documents of C4, each of which is a row. A model that learns from rows of questions and answers alone, such as an
encoder-decoder, is calibrated on such rows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from coppice import data
from coppice.core.aliases import Record
from coppice.core.errors import DataError
from coppice.data.row_sources import RowSource
from coppice.models.kinds import ModelKind
from coppice.models.towers import Batch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from coppice.models import Reader

TOKENS = 4096  # in a batch
JOIN = "\n\n"
CHARACTERS = 6  # of text for each token that is still needed; if it is too little, more rows are read


def batches(kind: ModelKind, reader: Reader, calibration: Record, context: int, seed: int) -> tuple[list[Batch], str]:
    """Return calibration batches, and the fingerprint of the data.

    They are windows of text, LongTensors [B, T], if the kind of model reads running text, and otherwise what it makes
    of random rows.

    Args:
        kind: of the model.
        reader: of the model.
        calibration: {record (path of a dataset.json), dataset, samples, length in tokens, windows}. Windows are
            "running" (from any place of the text on, over the ends of rows) or "within-rows" (each lies in one row).
        context: the model's; windows are no longer than this.
        seed: of the places.

    Raises:
        DataError: the text has fewer tokens than a window.
    """
    import torch

    facts, tokenizer = data.facts(calibration["record"], "train"), reader.tokenizer
    if "text" not in kind.row_kinds:
        return _of_rows(kind, reader, calibration, context, seed), facts["fingerprint"]
    rows = data.texts(calibration["record"], "train")
    length = min(calibration["length"], context)
    draw = {"running": _running, "within-rows": _within_rows}[calibration["windows"]]
    found = draw(tokenizer, rows, calibration["samples"], length, torch.Generator().manual_seed(seed))
    if not found:
        raise DataError(
            f"dataset {calibration['dataset']}: its train rows have fewer than {length} tokens"
            f"{' each' if calibration['windows'] == 'within-rows' else ''}, too few to calibrate on. Name a larger "
            "dataset in candidates.calibration, or lower candidates.calibration.length."
        )
    return list(torch.stack(found).split(max(1, TOKENS // length))), facts["fingerprint"]


def _of_rows(kind: ModelKind, reader: Reader, calibration: Record, context: int, seed: int) -> list[Batch]:
    """Return the batches of random rows, of which each has at most `length` tokens; longer ones are cut."""
    name, prompt = calibration["dataset"], "chat" if reader.tokenizer.chat_template else "none"
    source = RowSource(name, calibration["record"], "train", prompt, reader, kind.row_kinds)
    places = random.Random(seed).sample(range(len(source.rows)), min(calibration["samples"], len(source.rows)))
    rows = [row for place in places for row in source.to_learn(place)[:1]]
    made = kind.examples(rows, reader, min(calibration["length"], context), False)
    found = kind.calibration([example for own in made for example in own])
    if not found:
        raise DataError(
            f"dataset {name}: no train row has an answer within candidates.calibration.length "
            f"({calibration['length']} tokens). Raise it, or name another dataset in candidates.calibration."
        )
    return found


def _running(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[str], samples: int, length: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """Return windows that begin at random characters of the joined rows; empty if the text is too short."""
    import torch

    ends = torch.tensor(list(accumulate(len(row) + len(JOIN) for row in rows)), dtype=torch.float64)
    found = []
    for place in torch.rand(samples, generator=generator, dtype=torch.float64) * ends[-1]:
        first = min(_row_at(ends, place), len(rows) - 1)
        share = 1 - float((ends[first] - place) / (len(rows[first]) + len(JOIN)))
        skipped = int(share * len(_encode(tokenizer, rows[first])))
        ids = _tokens_from(tokenizer, rows, ends, first, skipped + length)[skipped:]
        reach = CHARACTERS * length
        while len(ids) < length:  # the text ends here: take its last tokens
            first = _row_at(ends, (ends[-1] - reach).clamp(min=0))
            ids = _tokens_from(tokenizer, rows, ends, first, None)[-length:]
            if first == 0 and len(ids) < length:
                return []
            reach *= 2
        found.append(ids)
    return found


def _row_at(ends: torch.Tensor, place: torch.Tensor) -> int:
    """Return the index of the row that holds a character of the joined text; `ends` are those of the rows."""
    import torch

    return int(torch.searchsorted(ends, place, right=True))


def _tokens_from(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[str], ends: torch.Tensor, first: int, wanted: int | None
) -> torch.Tensor:
    """Return the first `wanted` tokens from the beginning of row `first` on, or all that follow if there are fewer."""
    before, factor = ends[first] - len(rows[first]) - len(JOIN), CHARACTERS
    while True:
        stop = len(rows) if wanted is None else max(first, _row_at(ends, before + factor * wanted)) + 1
        ids = _encode(tokenizer, JOIN.join(rows[first:stop]))
        if stop >= len(rows) or len(ids) >= wanted:
            return ids[:wanted]
        factor *= 2


def _within_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[str], samples: int, length: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """Return a window at a random place of each of up to `samples` random rows that have enough tokens."""
    import torch

    found = []
    for i in torch.randperm(len(rows), generator=generator).tolist():
        if len(rows[i].encode()) < length:  # a token has at least one byte: do not tokenize short rows
            continue
        ids = _encode(tokenizer, rows[i])
        if len(ids) >= length:
            start = int(torch.randint(len(ids) - length + 1, (), generator=generator))
            found.append(ids[start : start + length])
            if len(found) == samples:
                break
    return found


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    from coppice.stages.evaluate.perplexity import encode

    return encode(tokenizer, [text], "")
