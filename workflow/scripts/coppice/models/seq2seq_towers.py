"""The encoder and the decoder of T5 and mT5, and of BART and mBART: which blocks, heads and channels can be removed.

T5's stacks have three traps. Their first block alone holds the bias of relative positions, which all others reuse, so
it must stay. The bias has a column for each head, so a stack loses the same heads in every block. And one key of the
configuration holds the width of all MLPs, and one the number of all heads: a stack that is narrowed by itself does not
fit it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .towers import Anatomy, Batch, BlockOutput, Coupling, Part, Tower

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

    from .kinds import LoadedModel

ENCODER, DECODER = "encoder", "decoder"
T5, BART = ("t5", "mt5"), ("bart", "mbart")


@dataclass(frozen=True)
class Channels(Part):
    """The channels of an MLP: a row of each layer but the last, and a column of the last.

    Attributes:
        key: the configuration's key for their number.
    """

    key: str = field(default="d_ff", kw_only=True)

    def row_widths(self, module: nn.Module) -> list[int]:
        """Return 1 row each."""
        return [1] * (len(self.linears) - 1)

    def count(self, config: PretrainedConfig) -> int:
        """Return the width of the MLP."""
        return getattr(config, self.key)

    def changes(self, config: PretrainedConfig, count: int) -> dict[str, int]:
        """Return the width of the MLP."""
        return {self.key: count}

    def sizes(self, block: nn.Module, count: int) -> dict[str, int]:
        """Return the width of the MLP."""
        return {self.key: count}


class StackMlp(Channels):
    """The MLP of a T5 block: the last of its layers, whatever their number."""

    def module_of(self, block: nn.Module) -> nn.Module:
        """Return the MLP."""
        return block.layer[-1].DenseReluDense


class OwnMlp(Channels):
    """The MLP of a BART block, whose linear layers belong to the block itself."""

    def module_of(self, block: nn.Module) -> nn.Module:
        """Return the block."""
        return block


@dataclass(frozen=True)
class Heads(Part):
    """The heads of a T5 attention: `d_kv` rows of q, k and v, and as many columns of o.

    The first self-attention of a stack has a column of the bias of relative positions for each head.

    Attributes:
        layer: the place of the attention in the block.
        name: the key for the number in the list of odd shapes.
    """

    layer: int = field(default=0, kw_only=True)
    name: str = field(default="num_heads", kw_only=True)

    def module_of(self, block: nn.Module) -> nn.Module:
        """Return the attention."""
        return getattr(block.layer[self.layer], self.module)

    def couplings(self, block: nn.Module) -> Iterator[Coupling]:
        """Yield the linear layers, and the bias of relative positions if it is here."""
        yield from super().couplings(block)
        bias = getattr(self.module_of(block), "relative_attention_bias", None)
        if bias is not None:
            # later blocks reuse the bias, so what this block alone shows of its gradient would be wrong
            yield Coupling(bias, "weight", 1, 1, scored=False)

    def resized(self, block: nn.Module, count: int) -> None:
        """Note the number of heads wherever T5's attention keeps it."""
        super().resized(block, count)
        module = self.module_of(block)
        module.inner_dim = count * module.key_value_proj_dim
        if module.has_relative_attention_bias:
            module.relative_attention_bias.embedding_dim = count

    def row_widths(self, module: nn.Module) -> list[int]:
        """Return the rows of a head in q, k and v."""
        return [module.key_value_proj_dim] * 3

    def count(self, config: PretrainedConfig) -> int:
        """Return the number of heads."""
        return config.num_heads

    def changes(self, config: PretrainedConfig, count: int) -> dict[str, int]:
        """Return the number of heads. `d_kv` is a key of its own, so it needs no change."""
        return {"num_heads": count}

    def sizes(self, block: nn.Module, count: int) -> dict[str, int]:
        """Return the number of heads."""
        return {self.name: count}


QKVO = ("q", "k", "v", "o")
GATED, PLAIN = ("wi_0", "wi_1", "wo"), ("wi", "wo")
SELF = Heads("SelfAttention", QKVO, counted_in="n_heads", alike=True, noun="heads")
CROSS = Heads("EncDecAttention", QKVO, "n_heads", noun="heads of cross-attention", layer=1, name="cross_num_heads")


def anatomies(config: PretrainedConfig) -> tuple[Anatomy, ...]:
    """Return the encoder and the decoder; none if the architecture is not supported."""
    model_type = getattr(config, "model_type", None)
    if model_type in T5:
        parts = {"mlp": StackMlp("DenseReluDense", GATED if config.is_gated_act else PLAIN), "attention": SELF}
        both = {ENCODER: ("num_layers", parts), DECODER: ("num_decoder_layers", parts | {"cross-attention": CROSS})}
        return tuple(Anatomy(name, config, key, own, fixed=1, own_sizes=False) for name, (key, own) in both.items())
    if model_type in BART:
        # no heads: the configuration derives their width from d_model and their number
        mlp = OwnMlp("", ("fc1", "fc2"))
        return tuple(
            Anatomy(name, config, f"{name}_layers", {"mlp": replace(mlp, key=f"{name}_ffn_dim")})
            for name in (ENCODER, DECODER)
        )
    return ()


def towers(model: LoadedModel, found: Sequence[Anatomy]) -> list[Tower]:
    """Return the encoder and the decoder of a loaded model, of which `found` are the anatomies."""
    return [{ENCODER: Encoder, DECODER: Decoder}[anatomy.name](model, anatomy) for anatomy in found]


class Stack(Tower):
    """One of the two towers. A calibration batch is {input_ids, labels}, each [B, T] without padding."""

    def __init__(self, model: LoadedModel, anatomy: Anatomy) -> None:
        """Take a loaded model and the description of one of its towers."""
        super().__init__(model, anatomy)
        self._scale: float | None = None

    @property
    def stack(self) -> nn.Module:
        """The module that holds the blocks."""
        return {ENCODER: self.model.get_encoder, DECODER: self.model.get_decoder}[self.anatomy.name]()

    @property
    def _holder(self) -> str:
        return "block" if hasattr(self.stack, "block") else "layers"

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks of the stack."""
        return getattr(self.stack, self._holder)

    def keep_blocks(self, kept: Sequence[int]) -> None:
        """Keep the blocks `kept`, and renumber them."""
        from torch import nn

        blocks = nn.ModuleList([self.blocks[index] for index in kept])
        setattr(self.stack, self._holder, blocks)
        for index, block in enumerate(blocks):
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    # The caches of both attentions store keys and values by this index, so it must have no gaps.
                    module.layer_idx = index
        if self.stack.config is not self.config:  # T5's stacks have copies, by which they size their caches
            self.stack.config.num_layers = len(kept)

    def rows(self, batch: Batch) -> list[Batch]:
        """Return the rows of a batch."""
        count = len(batch["input_ids"])
        return [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(count)]

    def problem(self, batch: Batch) -> str:
        """Return what is wrong with a batch that is not one of pairs."""
        fits = isinstance(batch, Mapping) and {"input_ids", "labels"} <= set(batch)
        return "" if fits else "is not a mapping of input_ids and labels. Pass batches of pairs"

    def targets(self, batch: Batch) -> int:
        """Return the number of target tokens."""
        return batch["labels"].numel()

    def skipped(self, index: int, state: torch.Tensor, options: Mapping[str, Any]) -> BlockOutput:
        """Return the input of a T5 block with the biases of positions, which its first block makes for all others."""
        if self._holder == "layers":
            return state
        bias, cross = options.get("position_bias"), options.get("encoder_decoder_position_bias")
        if bias is None:
            bias = self.blocks[index].layer[0].SelfAttention.compute_bias(state.shape[1], state.shape[1], state.device)
        memory = options.get("encoder_hidden_states")
        if cross is None and memory is not None:
            heads = self.blocks[index].layer[1].EncDecAttention.n_heads
            cross = state.new_zeros(1, heads, state.shape[1], memory.shape[1])
        return state, bias, cross

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        return self.model.get_input_embeddings().weight.device

    def _final(self, state: torch.Tensor) -> torch.Tensor:
        """Return the output of the stack for that of its last block: BART's stacks have no last norm."""
        norms = [getattr(self.stack, name, None) for name in ("final_layer_norm", "layer_norm")]
        return next((norm(state) for norm in norms if norm is not None), state)

    def _encoded(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (ids, mask) of the sources, on the model's device."""
        ids = batch["input_ids"].to(self.device)
        return ids, ids.new_ones(ids.shape)

    def _decoded(self, memory: torch.Tensor, mask: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the states of the decoder's last layer for the targets."""
        ids = self.model.prepare_decoder_input_ids_from_labels(batch["labels"]).to(self.device)
        options = {"encoder_hidden_states": memory, "encoder_attention_mask": mask, "use_cache": False}
        return self.model.get_decoder()(input_ids=ids, **options).last_hidden_state

    def _loss(self, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        from . import output_head
        from .seq2seq_batches import Forward

        if self._scale is None:  # it takes a few passes, which must not happen while hooks count the calls of `run`
            self._scale = Forward(self.model).scale
        head, labels = self.model.get_output_embeddings(), batch["labels"].flatten().to(states.device)
        states = states.flatten(0, 1) * self._scale
        bias = getattr(self.model, "final_logits_bias", None)
        if bias is not None and bias.any():
            return output_head.summed_loss_of_logits(head(states) + bias, labels)
        return output_head.summed_loss(head, states, labels)


class Encoder(Stack):
    """The blocks that read the source."""

    def run(self, batch: Batch) -> None:
        """Run the encoder alone."""
        ids, mask = self._encoded(batch)
        self.stack(input_ids=ids, attention_mask=mask)

    def tokens(self, batch: Batch) -> int:
        """Return the number of tokens of the sources."""
        return batch["input_ids"].numel()

    def summed_loss(self, state: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the loss of the targets: through the whole decoder."""
        _, mask = self._encoded(batch)
        return self._loss(self._decoded(self._final(state), mask, batch), batch)


class Decoder(Stack):
    """The blocks that write the target, with their cross-attention."""

    def run(self, batch: Batch) -> None:
        """Run encoder and decoder, without the output layer."""
        ids, mask = self._encoded(batch)
        self._decoded(self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state, mask, batch)

    def tokens(self, batch: Batch) -> int:
        """Return the number of tokens of the targets."""
        return batch["labels"].numel()

    def summed_loss(self, state: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the loss of the targets: through the last norm and, in chunks, the output layer."""
        return self._loss(self._final(state), batch)
