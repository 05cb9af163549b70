"""The examples of a training: rows of one data set or a mixture, split, formatted, tokenised, with prompts masked."""

import logging
import random

import jinja2
import numpy

from coppice import data
from coppice.core.errors import DataError, SettingsError
from coppice.data import prompts

logger = logging.getLogger("coppice.finetuning")

IGNORED = -100  # the label that the loss leaves out


def prepare(datasets, settings, prompt, tokenizer, seed):
    """(training examples, validation examples or None, facts) by the `finetune.data` settings.

    datasets: name -> path of its dataset.json, of all that `settings` name. Each example is {input_ids, labels, row},
    `row` naming where it comes from. facts: {train_rows, validation_rows, skipped_rows, mixture}.
    Raises DataError where nothing is left to train on or to validate with, SettingsError for sizes that do not fit.
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
    checks, skipped_checks = _encode(held_out, sources, tokenizer, settings)
    names, cut = ", ".join(weights), settings["cutoff_len"]
    if not train:
        raise DataError(f"dataset {names}: no row is left to train on (cutoff_len {cut} masks them all)")
    if held_out and not checks:
        raise DataError(f"dataset {names}: no validation row has a response within cutoff_len {cut}")
    if skipped or skipped_checks:
        logger.warning("%d training and %d validation rows without a response token left out", skipped, skipped_checks)
    facts = {
        "train_rows": len(train),
        "validation_rows": len(checks),
        "skipped_rows": skipped + skipped_checks,
        "mixture": mixture,
    }
    return train, checks or None, facts


def weights_of(dataset):
    """name -> share of the examples, for one data set's name or a mapping of names to weights."""
    if isinstance(dataset, str):
        return {dataset: 1.0}
    total = sum(dataset.values())
    return {name: weight / total for name, weight in dataset.items()}


class _Source:
    """One data set's train rows and how they are formatted."""

    def __init__(self, name, record, prompt, tokenizer):
        self.name, table = name, data.load(record, "train")
        self.rows = table.to_list()
        self.formatter = prompts.Formatter(prompts.kind_of(table.column_names, name), prompt, tokenizer)
        if not tokenizer.is_fast:
            raise SettingsError("the model's tokenizer says not where its tokens lie in a text; use its fast version")

    def formatted(self, index):
        """(segments, whether EOS ends them) of one row."""
        try:
            return self.formatter(self.rows[index])
        except jinja2.TemplateError as error:
            raise DataError(f"dataset {self.name}, row {index}: the chat template refuses it: {error}") from error
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise DataError(
                f"dataset {self.name}, row {index}: does not hold a {self.formatter.kind} as its columns say: {error!r}"
            ) from error


def _mixture(weights, sizes, seed):
    """(name, row) pairs: as many as can be had without repeating a row, in the shares that `weights` asks for."""
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
    """(training rows, validation rows): so many rows, or such a share of them, are held out, chosen by `seed`."""
    count = round(val_size * len(chosen)) if 0 < val_size < 1 else int(val_size)
    if count >= len(chosen):
        raise SettingsError(
            f"finetune.data.val_size: {count} rows for validation, but the data set has only {len(chosen)}; lower it"
        )
    held = set(random.Random(f"validation {seed}").sample(range(len(chosen)), count))
    parts = ([], [])
    for place, pair in enumerate(chosen):
        parts[place in held].append(pair)
    return parts


def _encode(pairs, sources, tokenizer, settings):
    """(examples, number of rows left out because no label remains) of (name, row) pairs."""
    formatted = [(pair, *sources[pair[0]].formatted(pair[1])) for pair in pairs]
    ids = _Tokens(tokenizer)
    for (name, _), segments, _ in formatted:
        ids.ask(segments, sources[name].formatter.add_special_tokens)
    ids.run()
    examples, skipped = [], 0
    for (name, index), segments, ends in formatted:
        special = sources[name].formatter.add_special_tokens
        made = ids.example(segments, special, ends, settings["train_on_inputs"])
        kept = [part for part in _cut(*made, settings["cutoff_len"], sources[name].formatter.kind) if _learns(part)]
        examples += [part | {"row": f"{name}:{index}" if len(sources) > 1 else index} for part in kept]
        skipped += not kept
    return examples, skipped


def _learns(example):
    return any(label != IGNORED for label in example["labels"][1:])


def _cut(ids, labels, length, kind):
    """An example of at most `length` tokens; plain text goes on in further ones."""
    stop = len(ids) if kind == "text" else min(len(ids), length)
    return [
        {"input_ids": ids[start : start + length], "labels": labels[start : start + length]}
        for start in range(0, stop, length)
    ]


class _Tokens:
    """Token ids of many examples' texts, from two calls of the tokenizer: with its special tokens and without.

    An example's segments are tokenised as one text: a tokenizer may give a word other tokens where a text begins.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.asked = {True: {}, False: {}}

    def ask(self, segments, special):
        """Note an example."""
        self.asked[special][_joined(segments)] = None

    def run(self):
        """Tokenise all texts that were asked for."""
        for special, texts in self.asked.items():
            if texts:
                found = self.tokenizer(
                    list(texts), add_special_tokens=special, return_offsets_mapping=True, verbose=False
                )
                pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
                texts.update(zip(texts, pairs, strict=True))

    def example(self, segments, special, ends, train_on_inputs):
        """(ids, labels) of an example, with EOS where it `ends` by it; prompts' labels are `IGNORED`."""
        if not segments:
            return [], []
        end = self.tokenizer.eos_token_id
        ids, offsets = self.asked[special][_joined(segments)]
        learnt = _learnt(numpy.asarray(offsets).reshape(-1, 2), segments) | train_on_inputs
        labels = [token if said else IGNORED for token, said in zip(ids, learnt.tolist(), strict=True)]
        if ends and (not ids or ids[-1] != end or not learnt[-1]):
            # a tokenizer that ends every text with EOS by itself has not said so in a label
            ids = ids[:-1] if ids and ids[-1] == end else ids
            labels = labels[: len(ids)]
            return [*ids, end], [*labels, end]
        return ids, labels


def _joined(segments):
    return "".join(segment.text for segment in segments)


def _learnt(offsets, segments):
    """bool [tokens]: whether a token, by its characters [tokens, 2], holds any of a segment that is learnt."""
    found, start = numpy.zeros(len(offsets), dtype=bool), 0
    for segment in segments:
        stop = start + len(segment.text)
        if segment.learnt:
            found |= (offsets[:, 1] > start) & (offsets[:, 0] < stop) & (offsets[:, 1] > offsets[:, 0])
        start = stop
    return found
