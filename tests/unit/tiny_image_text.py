"""Tiny random image-text models of several architectures, with tokenizer and image processor, and noise."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
WORDS = [*SPECIAL, "<|video_pad|>", "user", "assistant", "\n", *(f"w{n}" for n in range(100))]
IMAGE = WORDS.index("<|image_pad|>")
TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 24,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "initializer_range": 0.2,
}
MARKS = {
    "image_token_id": IMAGE,
    "vision_start_token_id": IMAGE - 2,
    "vision_end_token_id": IMAGE - 1,
    "video_token_id": IMAGE + 1,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": 16,
}
# name -> settings of its configuration
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_vl": MARKS
    | {
        "text_config": TEXT | {"rope_parameters": ROPE | {"mrope_interleaved": True}},
        "vision_config": VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
    "qwen2_5_vl": MARKS
    | {
        "text_config": TEXT | {"rope_parameters": ROPE},
        "vision_config": VISION | {"window_size": 16, "fullatt_block_indexes": [1]},
    },
    "qwen2_vl": MARKS
    | {
        "text_config": TEXT | {"rope_parameters": ROPE},
        "vision_config": VISION | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": CLIP,
        "image_token_index": IMAGE,
        "image_seq_length": 16,
    },
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ p.text }}{% endif %}{% endfor %}{% endif %} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


@functools.cache
def build(name: str, **text: Any) -> torch.nn.Module:
    """Return a random model; `text` are other sizes of its text tower."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    settings = CONFIGS[name] | {"text_config": CONFIGS[name]["text_config"] | text}
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **settings)).eval()


def tokenizer() -> Any:
    """Return a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(SPECIAL)
    found = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>", pad_token="<pad>")
    found.chat_template = TEMPLATE
    return found


def save(name: str, folder: Path, **text: Any) -> Path:
    """Write a checkpoint with its tokenizer and its processor's files, and return the folder."""
    build(name, **text).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if name == "llava":
        edge = {"height": 16, "width": 16}
        processor = {"image_processor_type": "CLIPImageProcessor", "size": edge, "crop_size": edge}
    else:
        processor = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": 4,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "size": {"shortest_edge": 64, "longest_edge": 1024},
        }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def draw(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Write pictures of noise of several sizes and return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = numpy.random.default_rng(seed)
    names = []
    for place in range(count):
        height, width = numbers.integers(8, 40, 2)
        noise = numbers.integers(0, 255, (height, width, 3), dtype=numpy.uint8)
        names.append(f"{place}.png")
        Image.fromarray(noise).save(folder / names[-1])
    return names
