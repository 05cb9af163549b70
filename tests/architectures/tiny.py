"""Tiny random models of the architectures, in folders as a user has them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 96
LENGTH = 64  # the context length
USUAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": LENGTH,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": LENGTH}
SMALL_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# title -> (model_type, keys of the configuration besides the usual ones; None leaves a usual key out)
ARCHITECTURES = {
    "Llama": ("llama", {}),
    "Mistral": ("mistral", {}),
    "Qwen2": ("qwen2", {"head_dim": None}),
    "Qwen3": ("qwen3", {}),
    "Qwen2-MoE": ("qwen2_moe", {**EXPERTS, "head_dim": None, "shared_expert_intermediate_size": 16}),
    "Qwen3-MoE": ("qwen3_moe", EXPERTS),
    "Mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", {"sliding_window": 16}),
    "Gemma 3 (text)": ("gemma3_text", {"sliding_window": 16}),
    "Gemma 3 (with images)": ("gemma3", {}),
    "Phi": ("phi", {"head_dim": None, "num_key_value_heads": 4}),
    "Phi-3": ("phi3", {"head_dim": None}),
    "OLMo 2": ("olmo2", {"head_dim": None}),
    "StableLM": ("stablelm", {"head_dim": None}),
    "Granite": ("granite", {"head_dim": None}),
    "SmolLM3": ("smollm3", {"head_dim": None}),
    "Cohere 2": ("cohere2", {"sliding_window": 16}),
    "StarCoder2": ("starcoder2", {"head_dim": None}),
    "GPT-NeoX": ("gpt_neox", {"head_dim": None, "num_key_value_heads": None}),
    "GPT-2": ("gpt2", GPT),
    "GPT-J": ("gptj", {**GPT, "rotary_dim": 4}),
    "OPT": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "num_key_value_heads": None, "head_dim": None}),
    "Falcon": ("falcon", {"head_dim": None, "num_key_value_heads": None, "num_kv_heads": 2}),
    "BLOOM": ("bloom", {"n_layer": 4, "n_head": 4}),
    "MPT": ("mpt", {"d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": LENGTH, "expansion_ratio": 2}),
    "DeepSeek-V3": (
        "deepseek_v3",
        {**SMALL_MLA, "head_dim": None, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
        | {"n_group": 2, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
    ),
    "GPT-OSS": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
    "Mamba": ("mamba", {"state_size": 4, "expand": 2, "conv_kernel": 4, "time_step_rank": 4}),
}
# These have no keys of the usual names, and would keep them in their config.json
OWN_NAMES = {"gpt2", "gptj", "bloom", "mpt", "mamba"}
SHARED = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "hidden_size", "num_hidden_layers")


def configuration(title):
    """Return the configuration of a tiny model."""
    model_type, own = ARCHITECTURES[title]
    if model_type == "gemma3":
        text = {**USUAL, "sliding_window": 16, "model_type": "gemma3_text"}
        more = {"mm_tokens_per_image": 4, "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
        return AutoConfig.for_model("gemma3", text_config=text, vision_config=VISION, **more)
    usual = {key: USUAL[key] for key in SHARED} if model_type in OWN_NAMES else USUAL
    if model_type in ("gpt2", "gptj", "mpt"):
        usual = {key: usual[key] for key in SHARED[:4]}
    if model_type == "bloom":
        usual = {key: usual[key] for key in SHARED[:5]}
    return AutoConfig.for_model(model_type, **{k: v for k, v in {**usual, **own}.items() if v is not None})


def tokenizer():
    """Return a tokenizer of words, `w3` to `w95`."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "w3"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def save(title: str, folder: Path) -> Path:
    """Write a random model with its tokenizer to a folder, and return the folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(configuration(title))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
