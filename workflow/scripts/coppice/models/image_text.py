"""Image-text models: Qwen2-VL, Qwen2.5-VL, Qwen3-VL and LLaVA, which read pictures and text and write text.

Their text tower is a causal language model, so whatever serves those serves it too. `image_text_batches` trains them,
and `sight` reads the pictures.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from coppice.core.errors import DataError

from . import causal_lm, generating
from .causal_lm import CausalLM, KeyValueGroups
from .towers import Anatomy

if TYPE_CHECKING:
    from types import SimpleNamespace

    import torch
    from transformers import PretrainedConfig
    from transformers.utils import ModelOutput

    from .kinds import Decoding, Engine, Example, Inputs, LoadedModel
    from .readers import Reader
    from .rows import Row
    from .sight import Seen

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# tower -> names of its modules, of Qwen's models and of LLaVA; what is in none of them is text
TOWERS = {
    "projector": ("merger", "deepstack_merger_list", "multi_modal_projector"),
    "vision": ("visual", "vision_tower"),
}
PROBE_SIDE = 2  # tokens of a probe's picture along each side, for models that read any size


class ImageText(CausalLM):
    """The kind of models that answer questions about pictures."""

    name = "image-text"
    noun = "an image-text model"
    distills = False  # not tried with pictures
    prompts = ("chat", "none")
    tower_names = ("text", "vision", "projector")
    frozen_towers = ("vision", "projector")
    row_kinds = ("image-chat", "image-answer", "image-caption", *CausalLM.row_kinds)
    prunable = QWEN
    evaluators = ("perplexity", "zero_shot", "generation", "answers", "merge", "cost")
    arrangements = ("sorted",)
    validators = generating.VALIDATORS
    sees = True
    pipeline = "image-text-to-text"

    def fits(self, config: PretrainedConfig | SimpleNamespace) -> bool:
        """Return whether the architecture is one of those whose pictures `sight` can read."""
        return getattr(config, "model_type", None) in (*QWEN, "llava")

    def auto_class(self) -> type:
        """Return AutoModelForImageTextToText."""
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText

    def anatomies(self, config: PretrainedConfig) -> tuple[Anatomy, ...]:
        """Return the text tower; the vision tower is not pruned."""
        if config.model_type not in self.prunable:
            return ()
        attention = causal_lm.ATTENTION if config.model_type == "qwen3_vl" else FIXED_HEADS
        # Qwen3-VL adds features of the vision tower after its first blocks, by their number
        added = getattr(config.vision_config, "deepstack_visual_indexes", ())
        parts = {"mlp": causal_lm.MLP, "attention": attention}
        return (Anatomy("text", config.text_config, "num_hidden_layers", parts, fixed=len(added)),)

    # Training

    def adaptable(self, model: LoadedModel, layers: Sequence[str]) -> list[str]:
        """Return all layers: rows with pictures reach every tower."""
        return list(layers)

    def tower_of(self, layer: str) -> str:
        """Return the tower whose names the layer's path holds; the projector may lie inside the vision tower."""
        path = layer.split(".")
        return next((tower for tower, names in TOWERS.items() if any(name in path for name in names)), "text")

    def examples(self, rows: Sequence[Row], reader: Reader, cutoff: int, train_on_inputs: bool) -> list[list[Example]]:
        """Return token ids and labels of questions and answers, with as many tokens for a picture as it has features.

        A row whose pictures do not fit in `cutoff` tokens has no example: the model would see a part of a picture.
        """
        from . import text_examples

        found = super().examples([_widened(row, reader) for row in rows], reader, cutoff, train_on_inputs)
        for row, own in zip(rows, found, strict=True):
            seen = _seen(row, reader)
            if seen is None:
                continue
            own[:] = [
                example | {"seen": seen} for example in own if example["input_ids"].count(seen.token) == seen.tokens
            ]
            for example in own:
                pairs = zip(example["input_ids"], example["labels"], strict=True)
                example["labels"] = [text_examples.IGNORED if token == seen.token else label for token, label in pairs]
        return found

    def sort_key(self, example: Example) -> int:
        """Return the number of tokens."""
        return self.length(example)

    def engine(self, model: LoadedModel, token_limit: int, arrangement: str | None = None) -> Engine:
        """Return the engine that sorts by length."""
        from . import image_text_batches

        return image_text_batches.Engine(model, token_limit, arrangement)

    def inputs(self, examples: Sequence[Example], device: torch.device) -> Inputs:
        """Return token ids, padded to the right, with their mask and pictures."""
        import torch

        from . import image_text_batches

        found = image_text_batches.batch(examples)
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        found["attention_mask"] = (torch.arange(found["input_ids"].shape[1]) < lengths[:, None]).long()
        return {name: tensor.to(device) for name, tensor in found.items()}

    # Evaluation

    def answers(self, model: LoadedModel, reader: Reader, rows: Sequence[Row], decoding: Decoding) -> list[str]:
        """Return the answers to questions and pictures, generated in batches of similar lengths.

        Raises:
            DataError: The pictures of a row do not fit in the model's context.
        """
        from . import continuing, text_examples

        context = self.context_length(model.config)
        room = max(context - decoding.new_tokens, context // 2) if context else sys.maxsize
        seen = [_seen(row, reader) for row in rows]
        asked = text_examples.question_ids([_widened(row, reader) for row in rows], reader.tokenizer, room)
        for row, ids, own in zip(rows, asked, seen, strict=True):
            if own and ids.count(own.token) != own.tokens:
                raise DataError(
                    f"{row.pictures[0].path}: this picture (with {len(row.pictures) - 1} others of its row) takes "
                    f"{own.tokens} tokens, but only {room} of the model's {context} are free. Lower "
                    "evaluate.answers.new_tokens or the image processor's size, or remove the row."
                )
        questions = [
            continuing.Question(ids, row.stop, seen=own) for row, ids, own in zip(rows, asked, seen, strict=True)
        ]
        found = continuing.continuations(model, reader.tokenizer, questions, decoding, context)
        return [text or "" for text in found]

    def timed_inputs(self, model: LoadedModel, ids: torch.Tensor, before: ModelOutput | None) -> Inputs:
        """Return the inputs of a pass over text; a prompt makes the model forget the pictures of earlier answers."""
        for module in model.modules() if before is None else ():
            if getattr(module, "rope_deltas", None) is not None:
                # Qwen's models keep how far pictures shifted the positions, and would shift those of this text, too
                module.rope_deltas = None
        return super().timed_inputs(model, ids, before)

    # Checks by fixed inputs

    def probes(self, model: LoadedModel) -> list[Inputs]:
        """Return sequences of random tokens, and one with a picture of random pixels."""
        return [*super().probes(model), _picture_probe(model)]


def _seen(row: Row, reader: Reader) -> Seen | None:
    """Return the pictures of a row as a model sees them; None if it has none."""
    from . import sight

    if not row.pictures:
        return None
    mark = reader.tokenizer.convert_tokens_to_ids(reader.placeholder.token)
    tokens = sum(sight.tokens_of(picture, reader) for picture in row.pictures)
    return sight.Seen(tuple(row.pictures), reader.image_processor, mark, tokens)


def _widened(row: Row, reader: Reader) -> Row:
    """Return a row whose text has as many tokens for each picture as the picture has features."""
    from . import sight

    if not row.pictures:
        return row
    token = reader.placeholder.token
    counts = iter([sight.tokens_of(picture, reader) for picture in row.pictures])
    segments = []
    for segment in row.segments:
        first, *rest = segment.text.split(token)
        segments.append(replace(segment, text="".join([first, *(token * next(counts) + text for text in rest)])))
    return replace(row, segments=segments)


def _picture_probe(model: LoadedModel) -> Inputs:
    """Return a picture between random tokens, in the form of the model's image processor."""
    import torch

    config, vision = model.config, model.config.vision_config
    draw = torch.Generator().manual_seed(0)
    if hasattr(vision, "spatial_merge_size"):
        side = PROBE_SIDE * vision.spatial_merge_size
        values = vision.temporal_patch_size * getattr(vision, "in_channels", 3) * vision.patch_size**2
        pixels, count = torch.randn(side * side, values, generator=draw), PROBE_SIDE**2
        more = {"image_grid_thw": torch.tensor([[1, side, side]])}
    else:
        pixels, count = torch.randn(1, 3, vision.image_size, vision.image_size, generator=draw), config.image_seq_length
        more = {}
    mark = config.image_token_id
    reserved = {mark, getattr(config, "video_token_id", None)}
    words = [token for token in range(model.get_input_embeddings().weight.shape[0]) if token not in reserved]
    order = torch.randint(len(words), (2, 8), generator=draw)
    before, after = ([words[place] for place in line] for line in order.tolist())
    ids = torch.tensor([[*before, *[mark] * count, *after]])
    if more:
        more["mm_token_type_ids"] = (ids == mark).int()
    found: Mapping[str, torch.Tensor] = {"input_ids": ids, "pixel_values": pixels, **more}
    device = model.get_input_embeddings().weight.device
    return {name: tensor.to(device) for name, tensor in found.items()}


@dataclass(frozen=True)
class FixedHeads(KeyValueGroups):
    """The KV groups of Qwen2-VL and Qwen2.5-VL, whose classes compute the width of a head from the number of heads.

    So their configuration cannot say that heads are gone: it keeps the dense model's numbers, and `pruned_shapes` has
    those of the layers.
    """

    def changes(self, config: PretrainedConfig, count: int) -> dict[str, int]:
        """Return no change."""
        return {}


FIXED_HEADS = FixedHeads(causal_lm.ATTENTION.module, causal_lm.ATTENTION.linears)

KIND = ImageText()
