"""From instruction rows to token ids with labels: prompt formats, truncation, masking of the prompt.

The Alpaca prompt is that of Stanford Alpaca (Taori et al. 2023), which LLM-Pruner's recovery uses too.
"""

import logging
from dataclasses import dataclass

from ..errors import CoppiceError, DataError, SettingsError

logger = logging.getLogger("coppice.finetuning")

COLUMNS = ("instruction", "output")
IGNORED = -100  # the label that the loss leaves out

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Formatter:
    """Turns a row {instruction, input, output} into (prompt, response) texts in one of the prompt formats."""

    kind: str
    tokenizer: object

    def __post_init__(self):
        if self.kind == "chat" and not self.tokenizer.chat_template:
            raise SettingsError("prompt: chat was asked for, but the model's tokenizer has no chat template")

    def __call__(self, row):
        instruction, extra, response = row["instruction"], row.get("input") or "", row["output"]
        if self.kind == "alpaca":
            template = ALPACA_WITH_INPUT if extra else ALPACA
            return template.format(instruction=instruction, input=extra), response
        asked = f"{instruction}\n\n{extra}" if extra else instruction
        if self.kind == "none":
            return f"{asked}\n", response
        message = [{"role": "user", "content": asked}]
        return self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True), response


def encode(rows, formatter, tokenizer, cutoff_len, train_on_inputs=False):
    """Token ids and labels of `rows`; returns (examples, number of rows left out).

    Each example is {input_ids, labels}, at most `cutoff_len` long; labels of the prompt are `IGNORED` unless
    `train_on_inputs`. A response that was not cut ends with EOS. Rows of which no label is left are left out.
    """
    examples, skipped = [], 0
    for row in rows:
        prompt, response = formatter(row)
        ids = tokenizer(prompt, add_special_tokens=formatter.kind != "chat")["input_ids"]
        # a tokenizer that ends every text with EOS would end the prompt before the response
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        answer = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        labels = (ids if train_on_inputs else [IGNORED] * len(ids)) + answer
        ids, labels = (ids + answer)[:cutoff_len], labels[:cutoff_len]
        if not response.strip() or all(label == IGNORED for label in labels[1:]):
            skipped += 1
            continue
        examples.append({"input_ids": ids, "labels": labels})
    return examples, skipped


def split(rows, val_size, seed):
    """(training rows, validation rows): `val_size` rows, chosen by `seed`, are kept for validation."""
    if not val_size:
        return rows, None
    if val_size >= len(rows):
        raise SettingsError(
            f"finetune.data.val_size: {val_size} rows for validation, but the data set has only {len(rows)}; lower it"
        )
    parts = rows.train_test_split(test_size=val_size, seed=seed, shuffle=True)
    return parts["train"], parts["test"]


def prepare(rows, formatter, tokenizer, settings, seed):
    """(training examples, validation examples or None, {rows, skipped...}) by `finetune.data` settings."""
    missing = [column for column in COLUMNS if column not in rows.column_names]
    if missing:
        raise DataError(
            f"datasets.{settings['dataset']}: fine-tuning needs the column {', '.join(missing)} "
            f"(it has {', '.join(rows.column_names)}); map it with datasets.{settings['dataset']}.columns"
        )
    train, validation = split(rows, settings["val_size"], seed)
    cut, whole = settings["cutoff_len"], settings["train_on_inputs"]
    examples, skipped = encode(train, formatter, tokenizer, cut, whole)
    if not examples:
        raise DataError(f"dataset {settings['dataset']}: no row is left to train on (cutoff_len {cut} masks them all)")
    checks, skipped_checks = encode(validation, formatter, tokenizer, cut, whole) if validation is not None else ([], 0)
    if skipped or skipped_checks:
        logger.warning("%d training and %d validation rows without a response token left out", skipped, skipped_checks)
    if validation is not None and not checks:
        raise CoppiceError(f"dataset {settings['dataset']}: no validation row has a response within cutoff_len {cut}")
    facts = {"train_rows": len(examples), "validation_rows": len(checks), "skipped_rows": skipped + skipped_checks}
    return examples, checks or None, facts
