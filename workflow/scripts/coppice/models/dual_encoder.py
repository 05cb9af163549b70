"""Dual encoders: CLIP and SigLIP, which embed texts and pictures so that those that belong together lie together.

`contrastive` trains them and `dual_towers` describes what can be pruned in them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coppice.core.errors import CheckpointError, DataError

from .kinds import ModelKind, Validator

if TYPE_CHECKING:
    from types import SimpleNamespace

    import torch
    from PIL.Image import Image
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor

    from .contrastive import Engine
    from .kinds import Decoding, Example, Inputs, LoadedModel
    from .readers import Reader
    from .rows import Picture, Row
    from .towers import Anatomy, Batch, Tower

logger = logging.getLogger("coppice.models")

MODELS = ("clip", "metaclip_2", "siglip")
# SigLIP was trained on texts of one length and reads a text's embedding at the last place, which may be padding
FULL_LENGTH = ("siglip",)
LEGACY_EOS = 2  # in a configuration: CLIP then reads a text's embedding at its largest id
LABEL = "a photo of a {}."  # the text that a label is learned as: CLIP's own prompt
PROBES = 4
AT_ONCE = 64  # texts or pictures that are embedded together in an evaluation


def _embedded_rows(
    kind: ModelKind, model: LoadedModel, reader: Reader, rows: Sequence[Row], decoding: Decoding
) -> list[Any]:
    """Return (embedding of the picture, embeddings of its captions) of each row."""
    if not rows:
        return []
    pictures = kind.embeddings(model, reader, pictures=[picture_of(row) for row in rows])
    texts = kind.embeddings(model, reader, texts=[caption for row in rows for caption in row.references])
    captions = texts.split([len(row.references) for row in rows])
    return list(zip(pictures.numpy(), (part.numpy() for part in captions), strict=True))


def _mean_recall(outputs: Sequence[Any], rows: Sequence[Row]) -> float:
    """Return recall@1 of all rows, averaged over both directions."""
    import numpy

    from coppice.stats import retrieval_metrics

    pictures: dict[str, int] = {}
    distinct: dict[str, int] = {}
    shown, texts, owners, copies = [], [], [], []
    for row, (picture, captions) in zip(rows, outputs, strict=True):
        if pictures.setdefault(row.pictures[0].sha256, len(shown)) == len(shown):
            shown.append(picture)
        for caption, embedding in zip(row.references, captions, strict=True):
            if distinct.setdefault(caption, len(texts)) == len(texts):
                texts.append(embedding)
            owners.append(pictures[row.pictures[0].sha256])
            copies.append(distinct[caption])
    found = retrieval_metrics.both_ways(numpy.stack(shown), numpy.stack(texts), owners, copies)
    return sum(retrieval_metrics.recall(ranks, 1) for ranks, _ in found.values()) / len(found)


# what the best checkpoint may be chosen by besides the loss, which depends on the number of pairs in a batch
VALIDATORS = {"recall@1": Validator(True, _embedded_rows, _mean_recall)}


class DualEncoder(ModelKind):
    """The kind of models with an encoder for texts and one for pictures."""

    name = "dual-encoder"
    noun = "a dual encoder"
    row_kinds = ("image-caption", "image-label")
    task_type = None  # peft's model for FEATURE_EXTRACTION passes `inputs_embeds`, which two towers do not take
    prunable = MODELS
    prunes_together = True
    adapter_groups: Mapping[str, tuple[str, ...]] = {"attention": ("self_attn",), "mlp": ("mlp",)}
    evaluators = ("retrieval", "classification", "merge")
    arrangements = ()
    tower_names = pruned_towers = ("text", "vision")
    prompts = ("none",)
    validators = VALIDATORS
    sees = True
    pipeline = "zero-shot-image-classification"
    coupled = True

    def fits(self, config: PretrainedConfig | SimpleNamespace) -> bool:
        """Return whether the model is CLIP, MetaCLIP 2 or SigLIP."""
        return getattr(config, "model_type", None) in MODELS

    def auto_class(self) -> type:
        """Return AutoModel."""
        from transformers import AutoModel

        return AutoModel

    def context_length(self, config: PretrainedConfig) -> int | None:
        """Return the number of positions of the text encoder."""
        return config.text_config.max_position_embeddings

    def anatomies(self, config: PretrainedConfig) -> tuple[Anatomy, ...]:
        """Return the text encoder and the vision encoder."""
        from . import dual_towers

        return dual_towers.anatomies(config)

    def towers(self, model: LoadedModel) -> list[Tower]:
        """Return the text encoder and the vision encoder."""
        from . import dual_towers

        return [dual_towers.Encoder(model, anatomy) for anatomy in self.anatomies(model.config)]

    def calibration(self, examples: Sequence[Example]) -> list[Batch]:
        """Return batches of pairs."""
        from . import dual_towers

        return dual_towers.calibration(examples)

    def adaptable(self, model: nn.Module, layers: Sequence[str]) -> list[str]:
        """Return all layers but those of SigLIP's pooling attention, whose fused kernel reads the weights itself."""
        from torch import nn

        fused = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
        return [layer for layer in layers if not layer.startswith(tuple(f"{name}." for name in fused))]

    def tower_of(self, layer: str) -> str:
        """Return the encoder; each has a projection of its own in CLIP."""
        return "vision" if layer.startswith(("vision_model.", "visual_projection")) else "text"

    def examples(self, rows: Sequence[Row], reader: Reader, cutoff: int, train_on_inputs: bool) -> list[list[Example]]:
        """Return the pair of each row; a label is learned as the caption `LABEL`."""
        config = _config_of(reader)
        captions = [caption_of(row) for row in rows]
        distinct = list(dict.fromkeys(caption for caption in captions if caption))
        ids = dict(zip(distinct, token_ids(distinct, reader.tokenizer, config, cutoff), strict=True))
        found = []
        for row, caption in zip(rows, captions, strict=True):
            if not caption:
                found.append([])
                continue
            picture = picture_of(row)
            pixels = Pixels(picture, reader.image_processor)
            inputs = {"input_ids": ids[caption], "pixels": pixels, "patches": patches(config)}
            found.append([inputs | {"keys": (_key(caption), _key(picture.sha256))}])
        return found

    def length(self, example: Example) -> int:
        """Return the tokens of the text and the patches of the picture."""
        from . import contrastive

        return contrastive.length(example)

    def targets(self, examples: Sequence[Example]) -> int:
        """Return the number of pairs."""
        return len(examples)

    def sort_key(self, example: Example) -> int:
        """Return the same for all: pairs are validated in the order of the data, since they are each other's negatives.

        In order of length, pairs with similar captions would meet.
        """
        return 0

    def engine(self, model: LoadedModel, token_limit: int, arrangement: str | None = None) -> Engine:
        """Return the engine of the contrastive loss."""
        from . import contrastive

        return contrastive.Engine(model, token_limit)

    def inputs(self, examples: Sequence[Example], device: torch.device) -> Inputs:
        """Return padded texts, and pictures."""
        from . import contrastive

        return {name: value.to(device) for name, value in contrastive.inputs_of(examples).items()}

    def embeddings(
        self,
        model: LoadedModel,
        reader: Reader,
        texts: Sequence[str] | None = None,
        pictures: Sequence[Picture] | None = None,
    ) -> torch.Tensor:
        """Return the embeddings [n, width] of texts or of pictures, each of length 1, on the CPU."""
        import torch

        from . import contrastive

        forward = contrastive.Encoders(model)
        if texts is not None:
            ids = token_ids(texts, reader.tokenizer, model.config, model.config.text_config.max_position_embeddings)
            batches = (forward.texts(contrastive.padded(part)) for part in _parts(ids))
        else:
            loaded = (torch.cat([Pixels(one, reader.image_processor)() for one in part]) for part in _parts(pictures))
            batches = (forward.pictures(part) for part in loaded)
        with torch.no_grad():
            return torch.cat([batch.cpu() for batch in batches])

    def probes(self, model: LoadedModel) -> list[Inputs]:
        """Return random texts, each with an end of text, and random pictures."""
        import torch

        text, vision = model.config.text_config, model.config.vision_config
        noise, device = torch.Generator().manual_seed(0), model.logit_scale.device
        ids = torch.randint(text.vocab_size, (PROBES, text.max_position_embeddings), generator=noise)
        if isinstance(text.eos_token_id, int) and text.eos_token_id < text.vocab_size:
            ids[:, -1] = text.eos_token_id
        pixels = torch.randn(PROBES, vision.num_channels, vision.image_size, vision.image_size, generator=noise)
        given = zip(ids.to(device), pixels.to(device), strict=True)
        return [{"input_ids": row[None], "pixel_values": picture[None]} for row, picture in given]

    def outputs(self, model: LoadedModel, inputs: Inputs) -> torch.Tensor:
        """Return the embeddings of texts and pictures [2, n, width]."""
        from . import contrastive

        return contrastive.Encoders(model)(inputs)


@dataclass(frozen=True)
class Pixels:
    """The pixels of a picture, which is opened when they are needed.

    Attributes:
        picture: opens as an image of Pillow (`data.pictures`).
        processor: the model's.
    """

    picture: Picture
    processor: BaseImageProcessor

    def __call__(self) -> torch.Tensor:
        """Return the pixels [1, channels, height, width]."""
        image: Image = self.picture.open()
        return self.processor(images=[image], return_tensors="pt")["pixel_values"]


def caption_of(row: Row) -> str:
    """Return the text that belongs to a row's picture; empty if there is none."""
    if row.references:
        return row.references[0]
    label = row.content.get("label")
    return "" if label is None or not str(label).strip() else LABEL.format(label)


def picture_of(row: Row) -> Picture:
    """Return the picture of a row. Raise DataError if there is none, or more than one."""
    if len(row.pictures) != 1:
        shown = ", ".join(picture.path for picture in row.pictures) or "none"
        raise DataError(
            f"the row with the text '{caption_of(row)[:80]}' has {len(row.pictures)} pictures ({shown}), but a dual "
            "encoder takes one. Make each picture a row of its own."
        )
    return row.pictures[0]


def token_ids(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, cutoff: int
) -> list[list[int]]:
    """Return the token ids of texts, cut to what the text encoder reads and to `cutoff`.

    Raises:
        CheckpointError: the tokenizer does not end a text as the encoder needs it.
    """
    if not texts:
        return []
    text = config.text_config
    options: dict[str, Any] = {"truncation": True, "max_length": min(cutoff, text.max_position_embeddings)}
    if config.model_type in FULL_LENGTH:
        options = {"truncation": True, "padding": "max_length", "max_length": text.max_position_embeddings}
    found = tokenizer(list(texts), **options)["input_ids"]
    if config.model_type in FULL_LENGTH:
        return found
    end = max(found[0]) if text.eos_token_id == LEGACY_EOS else text.eos_token_id
    if found[0][-1] != end:
        # the encoder would read the embedding at the beginning of each text, without an error
        raise CheckpointError(
            f"{tokenizer.name_or_path}: the tokenizer ends a text with token {found[0][-1]}, but the model reads a "
            f"text's embedding at token {end}. Use the tokenizer that belongs to this model, or correct "
            "text_config.eos_token_id in config.json."
        )
    return found


def patches(config: PretrainedConfig) -> int:
    """Return the number of patches that a picture is cut into."""
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2


def _config_of(reader: Reader) -> PretrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(Path(reader.tokenizer.name_or_path), local_files_only=True)


def _key(text: str) -> int:
    """Return a number of 63 bits by which equal texts or pictures are recognized."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def _parts(members: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(members), AT_ONCE):
        yield members[start : start + AT_ONCE]


KIND = DualEncoder()
