"""The two encoders of CLIP and SigLIP: which blocks, heads and channels can be removed, and by which loss.

CLIP's configuration says the width of each encoder's MLPs, so that plain transformers loads a model whose MLPs were
narrowed alike. It derives the width of a head from the number of heads, and SigLIP's vision encoder shares the width of
its MLPs with the head that pools: what is pruned there makes odd shapes (see `pruned_shapes.stacks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .towers import Anatomy, Batch, Part, Tower

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

    from .kinds import Example, LoadedModel

TEXT, VISION = "text", "vision"
AT_ONCE = 32  # pairs in a calibration batch


@dataclass(frozen=True)
class Structures(Part):
    """Channels or heads, whose number the configuration has under a key.

    Attributes:
        key: the configuration's key.
        stated: whether changing the key fits the pruned model. If not, its layers differ from the configuration.
        head_dim: whether a structure is a head, with as many rows and columns as it is wide.
    """

    key: str = "intermediate_size"
    stated: bool = True
    head_dim: bool = False

    def row_widths(self, module: nn.Module) -> list[int]:
        """Return the width of a structure, for each linear layer but the last."""
        return [module.head_dim if self.head_dim else 1] * (len(self.linears) - 1)

    def count(self, config: PretrainedConfig) -> int:
        """Return the number of structures."""
        return getattr(config, self.key)

    def changes(self, config: PretrainedConfig, count: int) -> dict[str, int]:
        """Return the number of structures, if the configuration can say it."""
        return {self.key: count} if self.stated else {}

    def sizes(self, block: nn.Module, count: int) -> dict[str, int]:
        """Return the number of structures."""
        return {self.key: count}


MLP = Structures("mlp", ("fc1", "fc2"))
QKVO = ("q_proj", "k_proj", "v_proj", "out_proj")
HEADS = Structures("self_attn", QKVO, "num_heads", False, "heads", "num_attention_heads", stated=False, head_dim=True)


def anatomies(config: PretrainedConfig) -> tuple[Anatomy, ...]:
    """Return the text encoder and the vision encoder."""
    pools = getattr(config.vision_config, "vision_use_head", False)  # SigLIP's head has an MLP of the same width
    parts = {TEXT: {"mlp": MLP, "attention": HEADS}}
    parts[VISION] = {"mlp": replace(MLP, stated=not pools), "attention": HEADS}
    configs = {TEXT: config.text_config, VISION: config.vision_config}
    return tuple(Anatomy(name, configs[name], "num_hidden_layers", parts[name]) for name in (TEXT, VISION))


def calibration(examples: Sequence[Example]) -> list[Batch]:
    """Return batches {input_ids, pixel_values, keys} of pairs whose texts have one length, so that none is padded.

    The pairs of a batch are each other's negatives, so a pair that is left alone is left out.
    """
    import torch

    from . import contrastive

    by_length: dict[int, list[Example]] = {}
    for example in examples:
        by_length.setdefault(len(example["input_ids"]), []).append(example)
    found = []
    for _, group in sorted(by_length.items()):
        for start in range(0, len(group), AT_ONCE):
            part = group[start : start + AT_ONCE]
            if len(part) > 1:
                keys = torch.tensor([example["keys"] for example in part])
                found.append(contrastive.inputs_of(part) | {"keys": keys})
    return found


class Encoder(Tower):
    """One of the two encoders."""

    def __init__(self, model: LoadedModel, anatomy: Anatomy) -> None:
        """Take a loaded model and the description of one of its towers."""
        super().__init__(model, anatomy)
        self._others: dict[int, tuple[Batch, torch.Tensor]] = {}

    @property
    def encoder(self) -> nn.Module:
        """The module that holds the blocks."""
        return getattr(self.model, f"{self.anatomy.name}_model").encoder

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks in their order."""
        return self.encoder.layers

    def keep_blocks(self, kept: Sequence[int]) -> None:
        """Keep the blocks `kept`; they have no numbers of their own."""
        from torch import nn

        self.encoder.layers = nn.ModuleList([self.blocks[index] for index in kept])

    def run(self, batch: Batch) -> None:
        """Run this encoder alone."""
        self._embedding(self.anatomy.name, batch)

    def summed_loss(self, state: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the contrastive loss of the pairs, with the embeddings that the other encoder gives."""
        import torch
        from transformers.modeling_outputs import BaseModelOutput

        from . import contrastive

        if id(batch) not in self._others:  # with the batch itself, so that its id stays its own
            other = {TEXT: VISION, VISION: TEXT}[self.anatomy.name]
            with torch.no_grad():
                self._others[id(batch)] = batch, self._embedding(other, batch)
        encoder = self.encoder
        # the model's own code then pools and projects the state
        encoder.forward = lambda **_: BaseModelOutput(last_hidden_state=state)
        try:
            own = self._embedding(self.anatomy.name, batch)
        finally:
            del encoder.forward
        pair = [own, self._others[id(batch)][1]]
        embeddings = torch.stack(pair if self.anatomy.name == TEXT else pair[::-1])
        return contrastive.losses(embeddings, batch["keys"], contrastive.Encoders(self.model).scales()).sum()

    def _embedding(self, name: str, batch: Batch) -> torch.Tensor:
        from . import contrastive

        encoders = contrastive.Encoders(self.model)
        return encoders.texts(batch["input_ids"]) if name == TEXT else encoders.pictures(batch["pixel_values"])

    def targets(self, batch: Batch) -> int:
        """Return the number of pairs."""
        return len(batch["keys"])

    def rows(self, batch: Batch) -> list[Batch]:
        """Return the batch: a pair alone has no loss, since the others are its negatives."""
        return [batch]

    def sequences(self, batch: Batch) -> int:
        """Return the number of pairs."""
        return len(batch["keys"])

    def tokens(self, batch: Batch) -> int:
        """Return the number of tokens or, with CLIP's token for the whole picture, of patches."""
        if self.anatomy.name == TEXT:
            return batch["input_ids"].numel()
        return len(batch["keys"]) * self.model.vision_model.embeddings.num_positions

    def problem(self, batch: Batch) -> str:
        """Return what is wrong with a batch that is not one of pairs."""
        fits = isinstance(batch, Mapping) and {"input_ids", "pixel_values", "keys"} <= set(batch)
        return "" if fits else "is not a mapping of input_ids, pixel_values and keys. Pass batches of pairs"
