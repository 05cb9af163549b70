"""Train the tiny models of the picture world and of the code world: T5, Qwen3-VL, CLIP, and a model for code.

They are trained by transformers' own losses on plain batches, and not by the engines of Coppice that the study then
runs on them.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coppice import data
from coppice.core import records
from coppice.core.aliases import PathLike, Record
from coppice.data import pictures
from coppice.data.picture_rows import CAPTION_PROMPT
from coppice.models import kinds, readers
from coppice.study.settings import registry

from . import tiny_readers
from .pretraining_loop import Rates, train
from .tiny_models import KIND_MODELS, KindModel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from coppice.models.readers import Reader

    Tables = Sequence[Sequence[Record]]

IGNORED = -100  # label of a token that is not learned


def train_kind(name: str, sources: Sequence[PathLike], output: Path, seed: int, steps: int | None = None) -> Record:
    """Train a tiny model with its own tokenizer and save it as a checkpoint folder.

    Args:
        name: a key of `KIND_MODELS`.
        sources: paths of the records of its data sets, in the order of its definition.
        output: folder to write.
        seed: seed of the weights and of the order of rows.
        steps: optimizer steps, if not those of its definition.

    Returns:
        Facts about the training: kind, steps, final_loss (mean over the last steps), seconds.
    """
    import torch
    from transformers import AutoConfig

    torch.manual_seed(seed)
    kind, spec, trained = registry.OTHER_MINIATURES[name].kind, KIND_MODELS[name], TRAINED[name]
    rng = random.Random(f"{name} {seed}")
    tables = [data.load(record, "train").to_list() for record in sources]
    reader = trained.reader(spec, [text for rows in tables for row in rows for text in trained.texts(row)])
    config = AutoConfig.for_model(**_completed(spec.config, reader.tokenizer))
    model = kinds.named(kind).auto_class().from_config(config)
    reader = _as_users_get_it(reader, model, output)
    tables = [_with_pictures(rows, record, reader) for rows, record in zip(tables, sources, strict=True)]
    batches = (trained.inputs(rows, reader, rng) for rows in _batches(tables, spec.batch_size, rng))
    facts = train(model, batches, steps or spec.steps, Rates(spec.muon_rate, spec.adamw_rate))
    model.eval()
    model.save_pretrained(output)
    records.as_new_files(output)
    return {"kind": kind, **facts}


def _with_pictures(rows: Sequence[Record], record: PathLike, reader: Reader) -> list[Record]:
    """Return rows with what they show under `picture`, if they show anything."""
    album = pictures.album(record, "train", reader)
    return [row | {"picture": picture} for row in rows for picture in album.of_row(row)] or list(rows)


def _completed(config: Record, tokenizer: PreTrainedTokenizerBase) -> Record:
    """Return a configuration with the vocabulary's size and the ids of the tokenizer's special tokens."""
    names = (*("pad", "bos", "eos"), *("image", "video", "vision_start", "vision_end"))
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in names}
    found = {key: value for key, value in ids.items() if value is not None} | {"vocab_size": len(tokenizer)}
    if "text_config" not in config:
        return config | found
    outer = {key: value for key, value in found.items() if key.startswith(("image", "video", "vision"))}
    inner = {key: value for key, value in found.items() if key not in outer}
    return config | outer | {"text_config": config["text_config"] | inner}


def _as_users_get_it(reader: Reader, model: PreTrainedModel, output: Path) -> Reader:
    """Save the reader and load it as users do, because `AutoTokenizer` may split texts in its own way."""
    from transformers import AutoTokenizer

    for part in (model.config, reader.tokenizer, reader.image_processor):
        if part is not None:
            part.save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    return readers.seeing(output, tokenizer) if reader.image_processor else readers.Reader(tokenizer)


def _batches(tables: Tables, size: int, rng: random.Random) -> Iterator[list[Record]]:
    """Yield batches without end, with equally many rows of each table; every epoch uses each row at most once."""
    streams = [_shuffled(rows, rng) for rows in tables]
    while True:
        yield [next(stream) for stream in streams for _ in range(size // len(streams))]


def _shuffled(rows: Sequence[Record], rng: random.Random) -> Iterator[Record]:
    while True:
        yield from rng.sample(rows, len(rows))


class _Trained(ABC):
    """How a tiny model reads the rows that it is trained on."""

    @abstractmethod
    def texts(self, row: Record) -> list[str]:
        """Return the texts of a row, from all of which the vocabulary comes."""

    @abstractmethod
    def reader(self, spec: KindModel, texts: Sequence[str]) -> Reader:
        """Return a new tokenizer for the texts, and an image processor if the model sees."""

    @abstractmethod
    def inputs(self, rows: Sequence[Record], reader: Reader, rng: random.Random) -> dict[str, Any]:
        """Return the inputs of the model with which it returns its loss. rng: chooses among several captions."""


class _Captioner(_Trained):
    """T5: from a text to a caption."""

    def texts(self, row: Record) -> list[str]:
        return [row["prompt"], *row["captions"]]

    def reader(self, spec: KindModel, texts: Sequence[str]) -> Reader:
        return readers.Reader(tiny_readers.t5(texts, length=128))

    def inputs(self, rows: Sequence[Record], reader: Reader, rng: random.Random) -> dict[str, Any]:
        sources = _padded(reader, [row["prompt"] for row in rows])
        targets = reader.tokenizer(
            text_target=[rng.choice(row["captions"]) for row in rows], padding=True, return_tensors="pt"
        )
        return sources | {"labels": _labels(targets)}


class _Seer(_Trained):
    """Qwen3-VL: from a picture and a question to an answer."""

    def texts(self, row: Record) -> list[str]:
        return [row["question"], row["answer"]] if "question" in row else [CAPTION_PROMPT, *row["captions"]]

    def reader(self, spec: KindModel, texts: Sequence[str]) -> Reader:
        text, vision = spec.config["text_config"], spec.config["vision_config"]
        tokenizer = tiny_readers.qwen3_vl(texts, text["max_position_embeddings"], text["vocab_size"])
        images = tiny_readers.qwen3_vl_images(vision["patch_size"], vision["spatial_merge_size"])
        return readers.Reader(tokenizer, images)

    def inputs(self, rows: Sequence[Record], reader: Reader, rng: random.Random) -> dict[str, Any]:
        seen = reader.image_processor([row["picture"].open() for row in rows], return_tensors="pt")
        fills = (seen["image_grid_thw"].prod(dim=1) // reader.image_processor.merge_size**2).tolist()
        asked, whole = [], []
        for row, fill in zip(rows, fills, strict=True):
            question, answer = self.texts(row) if "question" in row else (CAPTION_PROMPT, rng.choice(row["captions"]))
            parts = [{"type": "image"}, {"type": "text", "text": question}]
            prompt = reader.tokenizer.apply_chat_template(
                [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
            )
            asked.append(prompt.replace(tiny_readers.IMAGE, tiny_readers.IMAGE * fill))
            whole.append(f"{asked[-1]}{answer}{tiny_readers.END}\n")  # as the template ends a turn
        inputs, prompts = _padded(reader, whole), reader.tokenizer(asked)["input_ids"]
        labels = _labels(inputs)
        for row, prompt in zip(labels, prompts, strict=True):
            row[: len(prompt)] = IGNORED
        images = (inputs["input_ids"] == reader.tokenizer.image_token_id).int()
        return inputs | {**seen, "mm_token_type_ids": images, "labels": labels}


class _Searcher(_Trained):
    """CLIP: pictures and their captions."""

    def texts(self, row: Record) -> list[str]:
        return row["captions"]

    def reader(self, spec: KindModel, texts: Sequence[str]) -> Reader:
        text = spec.config["text_config"]
        tokenizer = tiny_readers.clip(texts, text["max_position_embeddings"], text["vocab_size"])
        return readers.Reader(tokenizer, tiny_readers.clip_images())

    def inputs(self, rows: Sequence[Record], reader: Reader, rng: random.Random) -> dict[str, Any]:
        seen = reader.image_processor([row["picture"].open() for row in rows], return_tensors="pt")
        return _padded(reader, [rng.choice(row["captions"]) for row in rows]) | {**seen, "return_loss": True}


class _Coder(_Trained):
    """A model for code: fills in the middle, and learns all the text, as such models do in pretraining."""

    def texts(self, row: Record) -> list[str]:
        return [row["prefix"] + row["middle"] + row["suffix"]]

    def reader(self, spec: KindModel, texts: Sequence[str]) -> Reader:
        length, vocabulary = spec.config["max_position_embeddings"], spec.config["vocab_size"]
        return readers.Reader(tiny_readers.code(texts, length, vocabulary))

    def inputs(self, rows: Sequence[Record], reader: Reader, rng: random.Random) -> dict[str, Any]:
        before, after, fill = tiny_readers.FILL
        end = reader.tokenizer.eos_token
        texts = [f"{before}{row['prefix']}{after}{row['suffix']}{fill}{row['middle']}{end}" for row in rows]
        inputs = _padded(reader, texts)
        return inputs | {"labels": _labels(inputs)}


def _padded(reader: Reader, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    found = reader.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    return {key: found[key] for key in ("input_ids", "attention_mask")}


def _labels(encoded: Record) -> torch.Tensor:
    """Return the ids [rows, tokens] without the padding."""
    return encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, IGNORED)


TRAINED = {"t5": _Captioner(), "qwen3-vl": _Seer(), "clip": _Searcher(), "code": _Coder()}
