"""Turn formatted rows of text into token ids and labels, with the labels of prompts masked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy

from coppice.core.errors import SettingsError

from . import infilling
from .kinds import Example
from .rows import Row, Segment
from .tokenizing import check_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token that is not trained on: torch's cross-entropy skips it


def examples(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, cutoff: int, train_on_inputs: bool
) -> list[list[Example]]:
    """Return the examples {input_ids, labels} of each row; see `kinds.ModelKind.examples`.

    Args:
        rows: formatted rows. A divisible one is split, another one is cut off.
        tokenizer: a fast tokenizer.
        cutoff: the most tokens of an example.
        train_on_inputs: whether prompts are learned, too.

    Raises:
        SettingsError: The tokenizer is not a fast one, or it has no end-of-sequence token and rows need it.
    """
    if not tokenizer.is_fast:  # only fast tokenizers return the character offsets that prompts are masked by
        raise SettingsError(
            "the model's tokenizer is not a fast one, so it does not report character offsets. Put its fast version "
            "(tokenizer.json) into the model's folder."
        )
    if any(row.ends for row in rows):
        check_end(tokenizer, "the model")
    tokens, encoder = _Tokens(tokenizer), _encoder(rows, tokenizer, cutoff)
    for row in rows:
        if not _fills(row):
            tokens.add(row.segments, row.special_tokens)
    tokens.run()
    found = []
    for row in rows:
        if _fills(row):
            example = _infilled(row, encoder, train_on_inputs)
            found.append([example] if example else [])
            continue
        ids, labels = tokens.example(row.segments, row.special_tokens, row.ends, train_on_inputs)
        found.append([part for part in _cut(ids, labels, cutoff, row.divisible) if _has_target(part)])
    return found


def question_ids(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, room: int) -> list[list[int]]:
    """Return the token ids of what a model is asked in each row: all that comes before the answer.

    room: the most tokens. A longer question loses its beginning, or what its segments say.
    """
    asked = {place: [one for one in row.segments if not one.learned] for place, row in enumerate(rows) if _fills(row)}
    encoder, found = infilling.Encoder(asked.values(), tokenizer, room), []
    for place, row in enumerate(rows):
        if place in asked:
            found.append(list(itertools.chain(*(encoder.ids(asked[place]) or []))))
        else:
            ids = tokenizer(row.question, add_special_tokens=row.special_tokens, verbose=False)["input_ids"]
            ids = ids[:-1] if row.special_tokens and ids[-1:] == [tokenizer.eos_token_id] else ids
            found.append(ids[-room:])
    return found


def _fills(row: Row) -> bool:
    return infilling.is_infilling(row.segments)


def _encoder(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, cutoff: int) -> infilling.Encoder:
    filled = [row for row in rows if _fills(row)]
    return infilling.Encoder([row.segments for row in filled], tokenizer, cutoff - any(row.ends for row in filled))


def _infilled(row: Row, encoder: infilling.Encoder, train_on_inputs: bool) -> Example | None:
    """Return the example of a row with control tokens; None if the answer does not fit."""
    end = [encoder.tokenizer.eos_token_id] if row.ends else []
    pieces = encoder.ids(row.segments)
    if pieces is None:
        return None
    on = [segment.learned or train_on_inputs for segment in row.segments]
    labels = [token if learned else IGNORED for ids, learned in zip(pieces, on, strict=True) for token in ids]
    return {"input_ids": [*itertools.chain(*pieces), *end], "labels": labels + end}


def _has_target(example: Example) -> bool:
    # the first label is never a target: no token precedes it to predict it from
    return any(label != IGNORED for label in example["labels"][1:])


def _cut(ids: list[int], labels: list[int], length: int, divisible: bool) -> list[Example]:
    """Return examples of at most `length` tokens: a divisible text is split into several, others are cut off."""
    stop = len(ids) if divisible else min(len(ids), length)
    return [
        {"input_ids": ids[start : start + length], "labels": labels[start : start + length]}
        for start in range(0, stop, length)
    ]


class _Tokens:
    """Token ids of many texts, from two batched calls of the tokenizer: with its special tokens and without.

    The segments of an example are joined and tokenized as one text, because a tokenizer may split a word differently
    at the beginning of a text: SentencePiece puts a space marker there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.texts = {True: {}, False: {}}

    def add(self, segments: Sequence[Segment], special: bool) -> None:
        """Add the text of an example; `special` says whether the tokenizer's special tokens go around it."""
        self.texts[special][_joined(segments)] = None

    def run(self) -> None:
        """Tokenize all texts that were added."""
        for special, texts in self.texts.items():
            if texts:
                encoded = self.tokenizer(
                    list(texts), add_special_tokens=special, return_offsets_mapping=True, verbose=False
                )
                pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
                texts.update(zip(texts, pairs, strict=True))

    def example(
        self, segments: Sequence[Segment], special: bool, ends: bool, train_on_inputs: bool
    ) -> tuple[list[int], list[int]]:
        """Return (ids, labels) of an example, with an EOS at the end if it `ends`; labels of prompts are `IGNORED`."""
        if not segments:
            return [], []
        eos = self.tokenizer.eos_token_id
        ids, offsets = self.texts[special][_joined(segments)]
        trained = _in_response(numpy.asarray(offsets).reshape(-1, 2), segments) | train_on_inputs
        labels = [token if on else IGNORED for token, on in zip(ids, trained.tolist(), strict=True)]
        if ends and (not ids or ids[-1] != eos or not trained[-1]):
            # Some tokenizers append EOS themselves. That EOS covers no characters, so its label is masked and the
            # model would never learn to stop: replace it by one that is trained on.
            ids = ids[:-1] if ids and ids[-1] == eos else ids
            labels = labels[: len(ids)]
            return [*ids, eos], [*labels, eos]
        return ids, labels


def _joined(segments: Sequence[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def _in_response(offsets: numpy.ndarray, segments: Sequence[Segment]) -> numpy.ndarray:
    """Return a bool array [tokens]: whether any character of a token lies in a segment that is trained on.

    offsets: [tokens, 2], the first character of each token and the one after its last.
    """
    found, start = numpy.zeros(len(offsets), dtype=bool), 0
    for segment in segments:
        stop = start + len(segment.text)
        if segment.learned:
            # special tokens have the empty span (0, 0), which belongs to no segment
            found |= (offsets[:, 1] > start) & (offsets[:, 0] < stop) & (offsets[:, 1] > offsets[:, 0])
        start = stop
    return found
