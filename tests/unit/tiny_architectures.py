"""Tiny random causal language models of many architectures, to compare the engines with the harness's own backend.

Each has 2 layers, hidden size 32, a vocabulary of 128 ids and windows of 32 tokens, so that a test's rows are longer
than any window. Where lengths matter (longrope, dynamic NTK), the original context has 64 tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

WINDOW, ORIGINAL, CONTEXT = 32, 64, 256
SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
OLD = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "initializer_range": 0.2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MIXED = {"sliding_window": WINDOW, "layer_types": ["full_attention", "sliding_attention"]}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
DEEPSEEK = SIZES | LATENT
DEEPSEEK |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
DEEPSEEK |= {"moe_intermediate_size": 16, "first_k_dense_replace": 1}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0, 8.0, 12.0, 16.0],
    "factor": 4.0,
}


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    original = {"original_max_position_embeddings": ORIGINAL}
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0} | settings | original}


# name -> (model_type, settings). The engine must score these as a prefix tree.
TREE = {
    **{name: (name, GROUPED) for name in ("apertus", "arcee", "bitnet", "cohere", "glm", "glm4", "llama")},
    **{name: (name, GROUPED) for name in ("nemotron", "olmo", "olmo2", "qwen3", "seed_oss", "smollm3", "stablelm")},
    **{name: (name, GROUPED) for name in ("mistral", "gemma", "ernie4_5", "phi3")},
    **{name: (name, SIZES) for name in ("biogpt", "gpt_neox", "persimmon", "phi")},
    **{name: (name, GROUPED | EXPERTS) for name in ("olmoe", "qwen2_moe", "qwen3_moe")},
    **{name: (name, GROUPED | LOCAL_EXPERTS) for name in ("granitemoe", "mixtral")},
    "mistral-window": ("mistral", GROUPED | {"sliding_window": WINDOW}),
    "mixtral-window": ("mixtral", GROUPED | LOCAL_EXPERTS | {"sliding_window": WINDOW}),
    "phimoe-window": ("phimoe", GROUPED | LOCAL_EXPERTS | {"sliding_window": WINDOW}),
    "qwen2_moe-window": ("qwen2_moe", GROUPED | EXPERTS | MIXED | {"use_sliding_window": True}),
    "qwen3-window": ("qwen3", GROUPED | MIXED | {"use_sliding_window": True}),
    "qwen3_moe-window": ("qwen3_moe", GROUPED | EXPERTS | {"use_sliding_window": True, "sliding_window": WINDOW}),
    "smollm3-window": ("smollm3", GROUPED | MIXED | {"use_sliding_window": True, "no_rope_layer_interval": 2}),
    "ministral": ("ministral", GROUPED | MIXED | {"head_dim": 8}),
    "helium": ("helium", GROUPED | {"head_dim": 8}),
    "phi3-window": ("phi3", GROUPED | {"sliding_window": WINDOW}),
    "starcoder2": ("starcoder2", GROUPED | {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", GROUPED),
    "qwen2-window": ("qwen2", GROUPED | MIXED | {"use_sliding_window": True}),
    "cohere2": ("cohere2", GROUPED | MIXED),
    "gemma2": ("gemma2", GROUPED | MIXED | {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", GROUPED | MIXED | {"head_dim": 8}),
    "exaone4": ("exaone4", GROUPED | MIXED),
    "olmo3": ("olmo3", GROUPED | MIXED),
    "gpt_oss": ("gpt_oss", GROUPED | LOCAL_EXPERTS | MIXED | {"head_dim": 8}),
    "granite": ("granite", GROUPED | {"logits_scaling": 3.0, "residual_multiplier": 0.5}),
    "deepseek_v2": ("deepseek_v2", DEEPSEEK),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "falcon": ("falcon", SIZES | {"alibi": False}),
    "gpt2": ("gpt2", OLD),
    "gpt_bigcode": ("gpt_bigcode", OLD),
    "gptj": ("gptj", OLD | {"rotary_dim": 8}),
    "codegen": ("codegen", OLD | {"rotary_dim": 8}),
    "opt": ("opt", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "xglm": ("xglm", SIZES | {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "init_std": 0.2}),
    "llama-linear": ("llama", GROUPED | _rope("linear")),
    "llama-yarn": ("llama", GROUPED | _rope("yarn")),
    "llama-llama3": ("llama", GROUPED | _rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
    "phi3-longrope": ("phi3", GROUPED | {"rope_parameters": LONGROPE}),
    "phimoe": ("phimoe", GROUPED | LOCAL_EXPERTS),
    "phimoe-longrope": (
        "phimoe",
        GROUPED | LOCAL_EXPERTS | {"rope_parameters": LONGROPE | {"short_mscale": 1.2, "long_mscale": 1.3}},
    ),
}

# name -> (model_type, settings, a word of the reason). The engine must leave these to the harness's own backend.
FALLBACK = {
    "gpt_neo": (
        "gpt_neo",
        {"vocab_size": 128, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": CONTEXT}
        | {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW, "initializer_range": 0.2},
        "local attention",
    ),
    "llama-dynamic": (
        "llama",
        GROUPED | {"max_position_embeddings": ORIGINAL} | _rope("dynamic"),
        "dynamic NTK",
    ),
    "bloom": ("bloom", OLD | {"hidden_size": 32}, "ALiBi"),
    "mpt": ("mpt", {"vocab_size": 128, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT}, "ALiBi"),
    "falcon-alibi": ("falcon", SIZES | {"alibi": True}, "ALiBi"),
    "llama4": ("llama4_text", GROUPED | LOCAL_EXPERTS | {"attention_chunk_size": WINDOW, "head_dim": 8}, "chunked"),
    "doge": ("doge", GROUPED, "chosen"),
    "deepseek_v32": ("deepseek_v32", DEEPSEEK | {"index_topk": 16, "index_n_heads": 2, "index_head_dim": 8}, "chosen"),
    "mamba": (
        "mamba",
        {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4},
        "state",
    ),
    "jamba": (
        "jamba",
        GROUPED
        | {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"num_experts": 2, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        "state",
    ),
    "rwkv": (
        "rwkv",
        {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "context_length": CONTEXT},
        "state",
    ),
    "bert": ("bert", SIZES | {"is_decoder": False}, "each text alone"),
}


@functools.cache
def build(name: str, **overrides: Any) -> torch.nn.Module:
    """Return the model `name` of `TREE` or `FALLBACK`, in float32 and eval mode; the same one each time.

    overrides: keys of the configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = {**TREE, **FALLBACK}[name][:2]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings | overrides)).eval()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias") or (parameter.dim() > 1 and float(parameter.detach().std()) < 0.1):
                torch.nn.init.normal_(parameter, 0.0, 0.2)
    return model
