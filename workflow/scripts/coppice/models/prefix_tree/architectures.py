"""What is known about architectures in advance: which give exact results in a prefix tree, and which cannot.

In a prefix tree a token's place in the row differs from its position in its text, and texts of different lengths share
a forward pass. An architecture is exact there if every layer takes the mask and the positions that it is given, and if
no number depends on the place in the row or on what else is in the pass. `EXACT` lists the architectures for which
tests compare the tree with texts that run alone. An architecture that is not listed anywhere is decided by the probe
alone (see `probe`), with longer rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

# `model_type` of architectures with softmax attention that take any 4D mask, and whose positions (RoPE or a learned
# table) follow `position_ids`. Experts are chosen token by token, without a capacity that a batch could use up.
EXACT = frozenset(
    {
        *("apertus", "arcee", "biogpt", "bitnet", "codegen", "cohere", "cohere2", "deepseek_v2", "deepseek_v3"),
        *("ernie4_5", "exaone4", "falcon", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2"),
        *("gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "helium", "llama", "ministral"),
        *("mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3"),
        *("phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2"),
        "xglm",
    }
)

ALIBI = "its ALiBi biases follow a token's place in the row, and it takes no mask of its own for each token"
STATE = "it carries a state from one token of the row to the next, so a branch would see the branches before it"
CHOSEN_KEYS = "each of its tokens attends to a limited number of keys, which are chosen among all tokens of the row"

# `model_type` -> why it cannot take a prefix tree.
INEXACT = {
    "gpt_neo": "its local attention is cut by the place in the row, where other branches lie between",
    **dict.fromkeys(("bloom", "mpt"), ALIBI),
    **dict.fromkeys(("doge", "deepseek_v32", "glm_moe_dsa", "minimax_m3_vl_text", "big_bird"), CHOSEN_KEYS),
    **dict.fromkeys(
        (
            *("mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "zamba", "zamba2", "nemotron_h", "recurrent_gemma"),
            *("rwkv", "xlstm", "granitemoehybrid", "falcon_h1", "lfm2", "lfm2_moe", "qwen3_next", "kimi_linear"),
            *("minimax", "olmo_hybrid", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
        ),
        STATE,
    ),
}

# Kinds of layers (`layer_types`) for which `forward.TreeMasks` makes a mask.
MASKED_LAYERS = ("full_attention", "sliding_attention")

# RoPE with the same frequencies in every pass.
FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
DYNAMIC_ROPE = "its RoPE (dynamic NTK) takes its frequencies from the longest text that it has seen"
LONGROPE = "its RoPE (longrope) takes its frequencies from the longest text of the batch"

# Words in the names of settings whose number may limit what a token sees, or change how positions are treated.
LIMITING = ("window", "chunk", "original_max", "local", "topk", "block", "span", "stride", "floor_scale", "dense_len")


@dataclass(frozen=True)
class Knowledge:
    """What is known of a model from its configuration.

    Attributes:
        listed: True if tests prove that its architecture is exact in a prefix tree; False if only a probe can tell.
        obstacle: why it cannot take a prefix tree; "" if nothing is known against it.
        boundary: the length in tokens above which its RoPE uses other frequencies in the whole pass (longrope); None if
            there is none. Texts on both sides of it must not share a pass.
        dynamic: True if the frequencies of its RoPE depend on the passes before.
        limits: lengths in tokens at which the model may begin to compute in another way.
        context: the most positions of a text; None if unknown.
    """

    listed: bool
    obstacle: str
    boundary: int | None
    dynamic: bool
    limits: tuple[int, ...]
    context: int | None

    @property
    def by_length(self) -> str:
        """Why the numbers of a text may depend on the lengths of others in its batch; "" if they do not."""
        return LONGROPE if self.boundary else self.obstacle if self.mixes_lengths else ""

    @property
    def mixes_lengths(self) -> bool:
        """Whether the numbers of a text may depend on what else is in its batch, on padding too."""
        return self.dynamic or self.obstacle == CHOSEN_KEYS


def knowledge(model: nn.Module) -> Knowledge:
    """Return what is known of a model, without an adapter's wrapper, from its class and its configuration."""
    text = model.config.get_text_config()
    # code that comes with a checkpoint may name any architecture
    native = type(model).__module__.startswith("transformers.models.")
    ropes = list(_ropes(getattr(text, "rope_parameters", None)))
    kinds = {str(rope.get("rope_type", "default")) for rope in ropes}
    dynamic = any("dynamic" in kind for kind in kinds)
    boundaries = {
        int(rope["original_max_position_embeddings"])
        for rope in ropes
        if rope.get("rope_type") == "longrope" and rope.get("original_max_position_embeddings")
    }
    understood = all(kind in (*FIXED_ROPE, "longrope") for kind in kinds) and len(boundaries) <= 1
    boundary = max(boundaries, default=None)
    settings = {name: value for name, value in text.to_dict().items() if not (understood and name.startswith("rope_"))}
    limits = {number for name, number in _numbers(settings) if any(word in name for word in LIMITING)}
    return Knowledge(
        listed=native and understood and text.model_type in EXACT,
        obstacle=_obstacle(text, dynamic),
        boundary=boundary,
        dynamic=dynamic,
        limits=tuple(sorted(limits)),
        context=_context(text),
    )


def _obstacle(text: PretrainedConfig, dynamic: bool) -> str:
    """Return why a model with this configuration cannot take a prefix tree, or ""."""
    if dynamic:
        return DYNAMIC_ROPE
    if text.model_type in INEXACT:
        return INEXACT[text.model_type]
    if getattr(text, "alibi", False):
        return ALIBI
    return ""


def _ropes(parameters: object) -> Iterator[Mapping[str, Any]]:
    """Yield the RoPE parameters of a model: one set, or one for each kind of layer."""
    if not isinstance(parameters, Mapping):
        return
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    yield from nested or [parameters]


def _numbers(settings: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield (name, number) of all whole numbers above 1 in nested settings."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
            continue
        for one in value if isinstance(value, Iterable) and not isinstance(value, str) else (value,):
            if isinstance(one, int) and one > 1:
                yield name, int(one)


def _context(text: PretrainedConfig) -> int | None:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
