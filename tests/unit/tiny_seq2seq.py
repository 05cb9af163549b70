"""Tiny random encoder-decoders and a word-level tokenizer that ends its texts, as T5's and BART's do."""

from __future__ import annotations

import functools
from typing import Any

import torch

IDS = {"vocab_size": 128, "pad_token_id": 0, "eos_token_id": 2, "d_model": 32}
T5 = IDS | {"decoder_start_token_id": 0, "d_kv": 6, "d_ff": 48, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.0}
BART = IDS | {"bos_token_id": 1, "decoder_start_token_id": 2, "max_position_embeddings": 128, "dropout": 0.0}
BART |= {"encoder_layers": 3, "encoder_ffn_dim": 48, "encoder_attention_heads": 4, "forced_eos_token_id": None}
BART |= {"decoder_layers": 3, "decoder_ffn_dim": 48, "decoder_attention_heads": 4}
# name -> (model_type, settings)
ARCHITECTURES = {
    "t5": ("t5", T5 | {"feed_forward_proj": "relu"}),
    "flan-t5": ("t5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("mt5", T5 | {"feed_forward_proj": "gated-gelu"}),
    "bart": ("bart", BART),
    "mbart": ("mbart", BART),
}


def build(name: str, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """Return a tiny model of `ARCHITECTURES`: vocabulary 128, width 32, MLP width 48, 4 heads, 3 + 3 blocks.

    float32 and in eval mode. Its weights are random and large enough for logits to spread; FLAN-T5's output layer is a
    tensor of its own, as in its checkpoints.
    """
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    kind, settings = ARCHITECTURES[name]
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **settings | overrides)).eval()
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name and parameter_name.endswith("weight"):
                torch.nn.init.normal_(parameter, 1.0, 0.2)
            elif parameter_name.endswith("bias") or float(parameter.detach().std()) < 0.1:
                torch.nn.init.normal_(parameter, 0.0, 0.2)
        if name == "flan-t5":
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.3)
    return model


@functools.cache
def tokenizer():
    """Return a tokenizer with 128 ids: <pad>, <s>, </s>, and the words `w3` to `w127`. Each text ends with </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 128)}, "w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "w3"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def save(folder, name: str, seed: int = 0, **overrides: Any):
    """Write a tiny model and its tokenizer to a folder, and return the folder."""
    build(name, seed, **overrides).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
