"""Turn the rows of one data set, or of a mixture, into tokenized training and validation examples.

How a row becomes text is decided in `coppice.data.prompts`; here the text is tokenized and the prompts are masked.
"""

import logging
import random

import jinja2
import numpy

from coppice import data
from coppice.core.errors import DataError, SettingsError
from coppice.data import prompts

logger = logging.getLogger("coppice.finetuning")

IGNORED = -100  # label of a token that is not trained on: torch's cross-entropy skips it


def prepare(datasets, settings, prompt, tokenizer, seed):
    """Return the training examples, the validation examples (None if there are none), and facts about both.

    Args:
        datasets: name -> path of dataset.json, for every data set that `settings` name.
        settings: the section `finetune.data`.
        prompt: alpaca, chat or none.
        tokenizer: a fast tokenizer.
        seed: chooses the rows of a mixture and the rows that are held out for validation.

    Returns:
        Each example is {input_ids, labels, row}. `row` says where it comes from: the row's index, or "name:index" if
        there are several data sets. The facts are {train_rows, validation_rows, skipped_rows, mixture}.

    Raises:
        DataError: No row is left to train on or to validate with.
        SettingsError: `val_size` leaves nothing to train on, or the tokenizer is not a fast one.
    """
    weights = weights_of(settings["dataset"])
    sources = {name: _Source(name, datasets[name], prompt, tokenizer) for name in weights}
    chosen = _mixture(weights, {name: len(source.rows) for name, source in sources.items()}, seed)
    mixture = {name: sum(source == name for source, _ in chosen) for name in weights}
    if settings["validation"]:
        held = _Source(settings["validation"], datasets[settings["validation"]], prompt, tokenizer)
        sources, held_out = sources | {held.name: held}, [(held.name, index) for index in range(len(held.rows))]
    else:
        chosen, held_out = _split(chosen, settings["val_size"], seed)
    train, skipped = _encode(chosen, sources, tokenizer, settings)
    validation, skipped_validation = _encode(held_out, sources, tokenizer, settings)
    names, cut = ", ".join(weights), settings["cutoff_len"]
    if not train:
        raise DataError(
            f"dataset {names}: no training row has a response token within finetune.data.cutoff_len ({cut}). "
            "Raise cutoff_len, or check the responses."
        )
    if held_out and not validation:
        raise DataError(
            f"dataset {names}: no validation row has a response token within finetune.data.cutoff_len ({cut}). "
            "Raise cutoff_len, or check the responses."
        )
    if skipped or skipped_validation:
        logger.warning(
            "left out %d training and %d validation rows, which have no response token within cutoff_len",
            skipped,
            skipped_validation,
        )
    facts = {
        "train_rows": len(train),
        "validation_rows": len(validation),
        "skipped_rows": skipped + skipped_validation,
        "mixture": mixture,
    }
    return train, validation or None, facts


def weights_of(dataset):
    """Return name -> fraction of the examples; `dataset` is one name, or a mapping of names to weights."""
    if isinstance(dataset, str):
        return {dataset: 1.0}
    total = sum(dataset.values())
    return {name: weight / total for name, weight in dataset.items()}


class _Source:
    """The train rows of one data set and how they are formatted."""

    def __init__(self, name, record, prompt, tokenizer):
        self.name, table = name, data.load(record, "train")
        self.rows = table.to_list()
        self.formatter = prompts.Formatter(prompts.kind_of(table.column_names, name), prompt, tokenizer)
        if not tokenizer.is_fast:  # only fast tokenizers return the character offsets that prompts are masked by
            raise SettingsError(
                "the model's tokenizer is not a fast one, so it does not report character offsets. Put its fast "
                "version (tokenizer.json) into the model's folder."
            )

    def formatted(self, index):
        """Return the segments of one row, and whether an EOS token ends them."""
        try:
            return self.formatter(self.rows[index])
        except jinja2.TemplateError as error:
            raise DataError(
                f"dataset {self.name}, row {index}: the chat template rejects it: {error}. Correct the row."
            ) from error
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise DataError(
                f"dataset {self.name}, row {index}: cannot be read as a row of kind '{self.formatter.kind}', which "
                f"the columns of the data set indicate ({error!r}). Correct the row."
            ) from error


def _mixture(weights, sizes, seed):
    """Return (name, row) pairs in the proportions `weights`: as many as possible without repeating a row."""
    total = min(sizes[name] / share for name, share in weights.items())
    chosen = []
    for name, share in weights.items():
        count = min(sizes[name], round(total * share))
        picked = range(sizes[name])
        if count < sizes[name]:
            picked = sorted(random.Random(f"mixture {name} {seed}").sample(picked, count))
        chosen += [(name, index) for index in picked]
    return chosen


def _split(chosen, val_size, seed):
    """Return (training rows, validation rows); `val_size` is a number of rows, or below 1 a fraction of them."""
    count = round(val_size * len(chosen)) if 0 < val_size < 1 else int(val_size)
    if count >= len(chosen):
        raise SettingsError(
            f"finetune.data.val_size: {count} rows are to be held out for validation, but the data set has only "
            f"{len(chosen)}. Lower it."
        )
    held = set(random.Random(f"validation {seed}").sample(range(len(chosen)), count))
    parts = ([], [])
    for place, pair in enumerate(chosen):
        parts[place in held].append(pair)
    return parts


def _encode(pairs, sources, tokenizer, settings):
    """Return the examples of (name, row) pairs, and how many rows are left out because no label remains."""
    formatted = [(pair, *sources[pair[0]].formatted(pair[1])) for pair in pairs]
    tokens = _Tokens(tokenizer)
    for (name, _), segments, _ in formatted:
        tokens.add(segments, sources[name].formatter.add_special_tokens)
    tokens.run()
    examples, skipped = [], 0
    for (name, index), segments, ends in formatted:
        special = sources[name].formatter.add_special_tokens
        ids, labels = tokens.example(segments, special, ends, settings["train_on_inputs"])
        parts = _cut(ids, labels, settings["cutoff_len"], sources[name].formatter.kind)
        kept = [part for part in parts if _has_target(part)]
        examples += [part | {"row": f"{name}:{index}" if len(sources) > 1 else index} for part in kept]
        skipped += not kept
    return examples, skipped


def _has_target(example):
    # the first label is never a target: no token precedes it to predict it from
    return any(label != IGNORED for label in example["labels"][1:])


def _cut(ids, labels, length, kind):
    """Return examples of at most `length` tokens: plain text is split into several, other rows are cut off."""
    stop = len(ids) if kind == "text" else min(len(ids), length)
    return [
        {"input_ids": ids[start : start + length], "labels": labels[start : start + length]}
        for start in range(0, stop, length)
    ]


class _Tokens:
    """Token ids of many texts, from two batched calls of the tokenizer: with its special tokens and without.

    The segments of an example are joined and tokenized as one text, because a tokenizer may split a word differently
    at the beginning of a text: SentencePiece puts a space marker there.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.texts = {True: {}, False: {}}

    def add(self, segments, special):
        """Add the text of an example; `special` says whether the tokenizer's special tokens go around it."""
        self.texts[special][_joined(segments)] = None

    def run(self):
        """Tokenize all texts that were added."""
        for special, texts in self.texts.items():
            if texts:
                encoded = self.tokenizer(
                    list(texts), add_special_tokens=special, return_offsets_mapping=True, verbose=False
                )
                pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
                texts.update(zip(texts, pairs, strict=True))

    def example(self, segments, special, ends, train_on_inputs):
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


def _joined(segments):
    return "".join(segment.text for segment in segments)


def _in_response(offsets, segments):
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
