"""Sizes and training settings of the tiny models by family, readable without torch before a model exists."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TinyModel:
    """Sizes and training settings of one family.

    Rates are peak learning rates, scaled for the instruct version by `instruct_scale`. A step has `step_tokens` tokens
    in rows of `context` tokens.
    """

    vocab_size: int = 1536
    hidden_size: int = 128
    intermediate_size: int = 256
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    steps: int = 900
    step_tokens: int = 512
    context: int = 256
    muon_rate: float = 0.02
    adamw_rate: float = 1.6e-2
    instruct_steps: int = 160
    instruct_scale: float = 0.3


TINY_MODELS = {
    "llama": TinyModel(),
    "qwen": TinyModel(intermediate_size=272),
    "mistral": TinyModel(intermediate_size=288),
}
MODEL_TYPES = {"llama": "llama", "qwen": "qwen2", "mistral": "mistral"}


def sizes(model: TinyModel) -> dict[str, Any]:
    """Return the sizes under the names of config.json. The vocabulary may come out smaller on a small corpus."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.hidden_size // model.heads,
        "tie_word_embeddings": True,
    }


def expected(name: str) -> dict[str, Any]:
    """Return what the config.json of the miniature `name` (`llama`, `llama-instruct`, ...) will say about its size."""
    family = name.partition("-")[0]
    return {"model_type": MODEL_TYPES[family]} | sizes(TINY_MODELS[family])
