"""Turn the rows of one data set, or of a mixture, into training and validation examples.

How a row becomes text is decided in `coppice.data.prompts`, and how text becomes inputs and labels by the model's kind.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

from coppice.core.aliases import PathLike, Record
from coppice.core.errors import DataError, SettingsError
from coppice.data import picture_rows
from coppice.data.row_sources import RowSource
from coppice.models.kinds import Example, ModelKind
from coppice.models.rows import Row
from coppice.study.settings.sections.finetune import TrainingData

if TYPE_CHECKING:
    from coppice.models import Reader

Pair = tuple[str, int]  # (name of a data set, index of a row in it)

logger = logging.getLogger("coppice.finetuning")


def prepare(
    datasets: Mapping[str, PathLike],
    settings: TrainingData,
    prompt: str,
    reader: Reader,
    seed: int,
    kind: ModelKind,
) -> tuple[list[Example], list[Example] | None, Record]:
    """Return the training examples, the validation examples (None if there are none), and facts about both.

    Args:
        datasets: name -> path of dataset.json, for every data set that `settings` name.
        settings: the section `finetune.data`.
        prompt: alpaca, chat or none.
        reader: of the model; its tokenizer is a fast one.
        seed: chooses the rows of a mixture and the rows that are held out for validation.
        kind: the model's kind, which makes the examples.

    Returns:
        Each example is what the kind makes of a row, with `row`, which says where it comes from: the row's index, or
        "name:index" if there are several data sets. The facts are {train_rows, validation_rows, skipped_rows, mixture}.

    Raises:
        DataError: No row is left to train on or to validate with.
        SettingsError: `val_size` leaves nothing to train on, or the tokenizer is not a fast one.
    """
    sources, chosen, held_out = _divided(datasets, settings, prompt, reader, seed, kind)
    weights = weights_of(settings.dataset)
    train, skipped = _encode(chosen, sources, reader, kind, settings)
    validation, skipped_validation = _encode(held_out, sources, reader, kind, settings)
    names, cut, seen = ", ".join(weights), settings.cutoff_len, " and all of its pictures" if kind.sees else ""
    if not train:
        raise DataError(
            f"dataset {names}: no training row has a response token{seen} within finetune.data.cutoff_len ({cut}). "
            "Raise cutoff_len, or check the responses."
        )
    if kind.coupled and len(train) < 2:
        raise DataError(
            f"dataset {names}: one row is left to train on, but {kind.noun} learns by comparing rows. Add rows, "
            "or lower finetune.data.val_size."
        )
    if held_out and not validation:
        raise DataError(
            f"dataset {names}: no validation row has a response token{seen} within finetune.data.cutoff_len ({cut}). "
            "Raise cutoff_len, or check the responses."
        )
    if skipped or skipped_validation:
        logger.warning(
            "left out %d training and %d validation rows: no response token, or not all of their pictures, are within "
            "cutoff_len",
            skipped,
            skipped_validation,
        )
    mixed = chosen if settings.validation else [*chosen, *held_out]
    facts = {
        "train_rows": len(train),
        "validation_rows": len(validation),
        "skipped_rows": skipped + skipped_validation,
        "mixture": {name: sum(source == name for source, _ in mixed) for name in weights},
    }
    return train, validation or None, facts


def to_ask(
    datasets: Mapping[str, PathLike],
    settings: TrainingData,
    prompt: str,
    reader: Reader,
    seed: int,
    kind: ModelKind,
) -> list[Row]:
    """Return the validation rows as a model is asked them, with all their right answers; see `prepare`.

    Raises:
        DataError: A row has no answer.
    """
    sources, _, held_out = _divided(datasets, settings, prompt, reader, seed, kind)
    return [sources[name].to_ask(index) for name, index in held_out]


def _divided(
    datasets: Mapping[str, PathLike],
    settings: TrainingData,
    prompt: str,
    reader: Reader,
    seed: int,
    kind: ModelKind,
) -> tuple[dict[str, RowSource], list[Pair], list[Pair]]:
    """Return (the data sets, rows to train on, rows to validate with)."""
    weights = weights_of(settings.dataset)
    sources = {name: RowSource(name, datasets[name], "train", prompt, reader, kind.row_kinds) for name in weights}
    chosen = _mixture(weights, {name: len(source.rows) for name, source in sources.items()}, seed)
    if not settings.validation:
        return sources, *_split(chosen, settings.val_size, seed, sources)
    name = settings.validation
    held = RowSource(name, datasets[name], "train", prompt, reader, kind.row_kinds)
    return sources | {name: held}, chosen, [(name, index) for index in range(len(held.rows))]


def weights_of(dataset: str | Mapping[str, float]) -> dict[str, float]:
    """Return name -> fraction of the examples; `dataset` is one name, or a mapping of names to weights."""
    if isinstance(dataset, str):
        return {dataset: 1.0}
    total = sum(dataset.values())
    return {name: weight / total for name, weight in dataset.items()}


def _mixture(weights: Mapping[str, float], sizes: Mapping[str, int], seed: int) -> list[Pair]:
    """Return (name, row) pairs in the proportions `weights`: as many as possible without repeating a row."""
    total = min(sizes[name] / share for name, share in weights.items())
    chosen = []
    for name, share in weights.items():
        count = min(sizes[name], round(total * share))
        picked: Sequence[int] = range(sizes[name])
        if count < sizes[name]:
            picked = sorted(random.Random(f"mixture {name} {seed}").sample(picked, count))
        chosen += [(name, index) for index in picked]
    return chosen


def _split(
    chosen: Sequence[Pair], val_size: float, seed: int, sources: Mapping[str, RowSource]
) -> tuple[list[Pair], list[Pair]]:
    """Return (training rows, validation rows); rows that share their pictures are on one side.

    val_size: a number of rows, or below 1 a fraction of them. The last picture may add a few.
    """
    count = round(val_size * len(chosen)) if 0 < val_size < 1 else int(val_size)
    together: dict[Hashable, list[int]] = {}
    for place, (name, index) in enumerate(chosen):
        together.setdefault(tuple(picture_rows.digests(sources[name].rows[index])) or place, []).append(place)
    groups, held = list(together.values()), set()
    for number in random.Random(f"validation {seed}").sample(range(len(groups)), min(count, len(groups))):
        held |= set(groups[number] if len(held) < count else ())
    if len(held) >= len(chosen):
        pictures = f", of {len(groups)} pictures," if len(groups) < len(chosen) else ""
        raise SettingsError(
            f"finetune.data.val_size: {count} rows are to be held out for validation, but the data set has only "
            f"{len(chosen)}{pictures} and none would be left to train on. Lower it."
        )
    parts: tuple[list[Pair], list[Pair]] = ([], [])
    for place, pair in enumerate(chosen):
        parts[place in held].append(pair)
    return parts


def _encode(
    pairs: Sequence[Pair],
    sources: Mapping[str, RowSource],
    reader: Reader,
    kind: ModelKind,
    settings: TrainingData,
) -> tuple[list[Example], int]:
    """Return the examples of (name, row) pairs, and how many rows are left out because no label remains."""
    rows = [sources[name].to_learn(index) for name, index in pairs]
    every = [row for answers in rows for row in answers]
    found = iter(kind.examples(every, reader, settings.cutoff_len, settings.train_on_inputs))
    examples, skipped = [], 0
    for (name, index), answers in zip(pairs, rows, strict=True):
        own = [*itertools.chain(*itertools.islice(found, len(answers)))]
        examples += [example | {"row": f"{name}:{index}" if len(sources) > 1 else index} for example in own]
        skipped += not own
    return examples, skipped
