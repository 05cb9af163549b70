"""Sizes and trainings of the tiny models, by family: known before anything is built, and without torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Sizes and training of one family. Rates are peak learning rates; a step has rows of `context` tokens."""

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


RECIPES = {
    "llama": Recipe(),
    "qwen": Recipe(intermediate_size=272),
    "mistral": Recipe(intermediate_size=288),
}
MODEL_TYPES = {"llama": "llama", "qwen": "qwen2", "mistral": "mistral"}


def sizes(recipe: Recipe) -> dict:
    """The sizes of a model, as its config.json names them; of a small corpus the vocabulary comes out smaller."""
    return {
        "vocab_size": recipe.vocab_size,
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.intermediate_size,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads,
        "head_dim": recipe.hidden_size // recipe.heads,
        "tie_word_embeddings": True,
    }


def expected(name: str) -> dict:
    """What the config.json of the miniature `name` (`llama`, `llama-instruct`, ...) will say of its size."""
    family = name.partition("-")[0]
    return {"model_type": MODEL_TYPES[family]} | sizes(RECIPES[family])
