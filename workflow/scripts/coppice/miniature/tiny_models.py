"""Sizes and training settings of the tiny models, readable without torch before a model exists.

`TINY_MODELS` are the causal language models of the text world, by family. `KIND_MODELS` are one model of each of the
other kinds, and a code model.
"""

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


@dataclass(frozen=True)
class KindModel:
    """A tiny model of the picture world or of the code world, and how it is trained.

    Its kind is in `registry.OTHER_MINIATURES`.

    Attributes:
        config: the content of its config.json, except for what its tokenizer decides.
        datasets: the miniature data sets that it is trained on.
        steps: optimizer steps.
        batch_size: rows of a step.
        muon_rate: peak learning rate of hidden matrices.
        adamw_rate: peak learning rate of all other parameters.
    """

    config: dict[str, Any]
    datasets: tuple[str, ...]
    steps: int
    batch_size: int
    adamw_rate: float
    muon_rate: float = 0.02


KIND_MODELS = {
    "t5": KindModel(
        config={
            "model_type": "t5",
            "vocab_size": 128,
            "d_model": 96,
            "d_kv": 24,
            "d_ff": 256,
            "num_layers": 3,
            "num_decoder_layers": 3,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
        datasets=("captions",),
        steps=350,
        batch_size=32,
        adamw_rate=1e-2,
    ),
    "qwen3-vl": KindModel(
        config={
            "model_type": "qwen3_vl",
            "tie_word_embeddings": True,
            "text_config": {
                "model_type": "qwen3_vl_text",
                "vocab_size": 512,
                "hidden_size": 96,
                "intermediate_size": 256,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 24,
                "max_position_embeddings": 256,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [4, 4, 4],
                    "mrope_interleaved": True,
                },
            },
            "vision_config": {
                "model_type": "qwen3_vl",
                "depth": 3,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_heads": 4,
                "patch_size": 8,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "out_hidden_size": 96,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [1],
            },
        },
        datasets=("picture-captions", "picture-questions"),
        steps=400,
        batch_size=32,
        adamw_rate=1e-2,
    ),
    "clip": KindModel(
        config={
            "model_type": "clip",
            "projection_dim": 64,
            "text_config": {
                "model_type": "clip_text_model",
                "vocab_size": 400,
                "hidden_size": 96,
                "intermediate_size": 256,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "max_position_embeddings": 40,
            },
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 96,
                "intermediate_size": 256,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "image_size": 64,
                "patch_size": 16,
            },
        },
        datasets=("picture-pairs",),
        steps=300,
        batch_size=128,
        adamw_rate=5e-3,
    ),
    "code": KindModel(
        config={
            "model_type": "qwen2",
            "vocab_size": 800,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 384,
            "tie_word_embeddings": True,
        },
        datasets=("code",),
        steps=320,
        batch_size=16,
        adamw_rate=1.6e-2,
    ),
}


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
    if name in KIND_MODELS:
        return KIND_MODELS[name].config
    family = name.partition("-")[0]
    return {"model_type": MODEL_TYPES[family]} | sizes(TINY_MODELS[family])
