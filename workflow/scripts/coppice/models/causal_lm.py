"""Causal language models (decoders): Llama, Qwen, Mistral and whatever else `AutoModelForCausalLM` loads.

Its accelerators are `packing` for training, and `tree_scoring` and `output_head` for evaluation.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import dimensions, generating, infilling
from .kinds import ModelKind
from .towers import Anatomy, Part, Tower

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import SimpleNamespace

    import torch
    from torch import nn
    from transformers import PretrainedConfig
    from transformers.utils import ModelOutput

    from .kinds import Decoding, Engine, Example, Fallback, Inputs, LoadedModel, Scorer
    from .readers import Reader
    from .rows import Row

CACHES = ("past_key_values", "cache_params")  # of attention, and of state-space models such as Mamba
PROBES, PROBE_TOKENS = 4, 64  # random sequences of token ids, and their length, on which logits are compared
LAYERS = {"attention": ("attn", "attention"), "mlp": ("mlp", "ffn", "feed_forward", "moe", "fc1", "fc2")}
# A fused kernel of these models reads the weight of the layer itself, so that peft refuses an adapter on it
READ_DIRECTLY = dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"), ("out_proj", "conv1d"))


class CausalLM(ModelKind):
    """The kind of decoders that predict the next token."""

    name = "causal-lm"
    noun = "a causal language model"
    distills = True
    row_kinds = ("chat", "instruction", "completion", "program", "fim", "text")
    task_type = "CAUSAL_LM"
    prunable = ("llama", "qwen2", "qwen3", "mistral")
    adapter_groups = LAYERS
    evaluators = ("perplexity", "zero_shot", "answers", "generation", "merge", "cost")
    arrangements = ("tree", "sorted")
    learns_inputs = True
    validators = generating.VALIDATORS

    def fits(self, config: PretrainedConfig | SimpleNamespace) -> bool:
        """Return True: what is of no other kind is tried as a causal language model."""
        return True

    def auto_class(self) -> type:
        """Return AutoModelForCausalLM."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def context_length(self, config: PretrainedConfig) -> int | None:
        """Return the number of positions, or None if the configuration does not state it."""
        return dimensions.of(config).context_length

    def anatomies(self, config: PretrainedConfig) -> tuple[Anatomy, ...]:
        """Return the decoder of the architectures in `prunable`, which are built alike."""
        if getattr(config, "model_type", None) not in self.prunable:
            return ()
        return (Anatomy("text", config, "num_hidden_layers", {"mlp": MLP, "attention": ATTENTION}),)

    def towers(self, model: LoadedModel) -> list[Tower]:
        """Return the decoder."""
        return [Decoder(model, anatomy) for anatomy in self.anatomies(model.config)]

    def adaptable(self, model: nn.Module, layers: Sequence[str]) -> list[str]:
        """Return the layers of the part that reads text, because no image or sound trains the others."""
        inside = {id(module) for module in model.get_decoder().modules()}
        without = READ_DIRECTLY.get(model.config.model_type, ())
        return [
            name
            for name in layers
            if id(model.get_submodule(name)) in inside and name.rpartition(".")[2] not in without
        ]

    def examples(self, rows: Sequence[Row], reader: Reader, cutoff: int, train_on_inputs: bool) -> list[list[Example]]:
        """Return token ids and labels of prompts and responses."""
        from . import text_examples

        return text_examples.examples(rows, reader.tokenizer, cutoff, train_on_inputs)

    def length(self, example: Example) -> int:
        """Return the number of tokens."""
        return len(example["input_ids"])

    def targets(self, examples: Sequence[Example]) -> int:
        """Return the number of tokens that are predicted."""
        from . import packing

        return packing.count_targets(examples)

    def sort_key(self, example: Example) -> list[int]:
        """Return the tokens, whose lexicographic order puts examples together that share a prefix."""
        return example["input_ids"]

    def engine(self, model: LoadedModel, token_limit: int, arrangement: str | None = None) -> Engine:
        """Return the engine that shares prefixes if that is exact for the model, and sorts by length if not."""
        from . import packing

        return packing.Engine(model, token_limit, arrangement)

    def inputs(self, examples: Sequence[Example], device: torch.device) -> Inputs:
        """Return token ids, padded to the right, with their mask."""
        import torch

        rows = [example["input_ids"] for example in examples]
        length = max(map(len, rows))
        ids = torch.tensor([row + [row[-1]] * (length - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
        return {"input_ids": ids, "attention_mask": mask}

    def token_losses(self, model: LoadedModel) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the negative log-likelihoods of tokens, with the output layer applied in chunks."""
        from . import output_head

        return output_head.token_losses_of(model)

    def scorer(self, model: LoadedModel, dtype: torch.dtype | None) -> Scorer | Fallback:
        """Return a scorer that shares prefixes if that is exact for the model, or why it is not."""
        from . import tree_scoring

        # Some models ignore the mask or the positions without an error and would give wrong scores.
        packer = tree_scoring.Packer(model, dtype)
        return packer.fallback() or packer

    def lengths_interact(self, model: LoadedModel) -> str:
        """Return what is known of the model's RoPE."""
        from . import output_head
        from .prefix_tree import architectures

        return architectures.knowledge(output_head.causal_lm(model)).by_length

    def answers(self, model: LoadedModel, reader: Reader, rows: Sequence[Row], decoding: Decoding) -> list[str]:
        """Return the answers, generated in batches of similar lengths; a question that is too long loses its start."""
        from . import continuing, text_examples

        context = self.context_length(model.config)
        room = max(context - decoding.new_tokens, context // 2) if context else sys.maxsize
        asked = text_examples.question_ids(rows, reader.tokenizer, room)
        questions = [
            continuing.Question(ids, row.stop, infills=infilling.is_infilling(row.segments))
            for ids, row in zip(asked, rows, strict=True)
        ]
        found = continuing.continuations(model, reader.tokenizer, questions, decoding, context)
        return [text or "" for text in found]

    def timed_inputs(self, model: LoadedModel, ids: torch.Tensor, before: ModelOutput | None) -> Inputs:
        """Return the tokens, with the caches of the pass before or, for a prompt, with the last token's logits only."""
        caches = {name: before[name] for name in CACHES if name in before} if before else {"logits_to_keep": 1}
        return {"input_ids": ids} | caches

    def probes(self, model: LoadedModel) -> list[Inputs]:
        """Return sequences of random tokens."""
        import torch

        embeddings = model.get_input_embeddings().weight
        length = min(PROBE_TOKENS, self.context_length(model.config) or PROBE_TOKENS)
        ids = torch.randint(embeddings.shape[0], (PROBES, length), generator=torch.Generator().manual_seed(0))
        return [{"input_ids": row[None]} for row in ids.to(embeddings.device)]

    def outputs(self, model: LoadedModel, inputs: Inputs) -> torch.Tensor:
        """Return the logits."""
        return model(**inputs, use_cache=False).logits


class Decoder(Tower):
    """The decoder blocks of Llama, Qwen2, Qwen3 and Mistral, and of the text towers of Qwen's image-text models."""

    @property
    def body(self) -> nn.Module:
        """The decoder without its output layer."""
        return self.model.get_decoder()

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks."""
        return self.body.layers

    def keep_blocks(self, kept: Sequence[int]) -> None:
        """Keep the blocks `kept`, and renumber them."""
        from torch import nn

        base = self.body
        base.layers = nn.ModuleList([base.layers[index] for index in kept])
        for index, block in enumerate(base.layers):
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    # The KV cache stores keys and values by this index, so it must have no gaps.
                    module.layer_idx = index
        if getattr(self.config, "layer_types", None) is not None:
            self.config.layer_types = [self.config.layer_types[index] for index in kept]

    def run(self, batch: torch.Tensor) -> None:
        """Run the body, without the output layer: full logits would be the largest tensor by far."""
        self.body(input_ids=batch.to(self.model.get_input_embeddings().weight.device), use_cache=False)

    def summed_loss(self, state: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """Return the summed next-token loss: through the last norm and, in chunks, the output layer."""
        from . import output_head

        hidden = self.body.norm(state)[:, :-1].flatten(0, 1)
        labels = batch[:, 1:].flatten().to(hidden.device)
        return output_head.summed_loss(self.model.get_output_embeddings(), hidden, labels)

    def targets(self, batch: torch.Tensor) -> int:
        """Return the number of tokens but the first of each row."""
        return batch.shape[0] * (batch.shape[1] - 1)


@dataclass(frozen=True)
class Channels(Part):
    """The channels of a gated MLP: one row of `gate_proj` and of `up_proj`, and one column of `down_proj`."""

    def row_widths(self, module: nn.Module) -> list[int]:
        """Return 1 row each."""
        return [1, 1]

    def count(self, config: PretrainedConfig) -> int:
        """Return the width of the MLP."""
        return config.intermediate_size

    def changes(self, config: PretrainedConfig, count: int) -> dict[str, int]:
        """Return the width of the MLP."""
        return {"intermediate_size": count}

    def sizes(self, block: nn.Module, count: int) -> dict[str, int]:
        """Return the width of the MLP."""
        return {"intermediate_size": count}


@dataclass(frozen=True)
class KeyValueGroups(Part):
    """The KV groups of an attention: a KV head with all its query heads.

    The query heads of a group are adjacent, so a group is a run of rows of `q_proj`, `k_proj` and `v_proj` (with their
    biases) and a run of columns of `o_proj`. Qwen3's `q_norm` and `k_norm` have one weight per position in a head and
    are shared by all heads, so they belong to no structure. `num_key_value_groups` of the module does not change,
    because a group is removed with all its query heads.
    """

    def row_widths(self, module: nn.Module) -> list[int]:
        """Return the rows of a group of query heads, of its key head and of its value head."""
        return [module.head_dim * module.num_key_value_groups, module.head_dim, module.head_dim]

    def count(self, config: PretrainedConfig) -> int:
        """Return the number of KV heads."""
        return config.num_key_value_heads

    def changes(self, config: PretrainedConfig, count: int) -> dict[str, int]:
        """Return the numbers of heads and their width."""
        per_group = config.num_attention_heads // config.num_key_value_heads
        # Set head_dim explicitly: its default, hidden_size / num_attention_heads, is wrong once heads are removed.
        return {
            "num_attention_heads": count * per_group,
            "num_key_value_heads": count,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        }

    def sizes(self, block: nn.Module, count: int) -> dict[str, int]:
        """Return the numbers of heads."""
        per_group = self.module_of(block).num_key_value_groups
        return {"num_attention_heads": count * per_group, "num_key_value_heads": count}


MLP = Channels("mlp", ("gate_proj", "up_proj", "down_proj"), counted_in="intermediate_size")
ATTENTION = KeyValueGroups("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj"), noun="KV groups")

KIND = CausalLM()
