"""What Coppice uses of torch, transformers, accelerate, bitsandbytes and lm-eval beyond their documented interfaces."""

import pytest
import torch
from torch import nn

from coppice.data import lm_eval_compat
from coppice.models import library_compat
from coppice.study.settings import registry


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_model_names_its_decoder_layers_as_whole_modules(tiny_model, architecture):
    model = tiny_model(architecture)
    assert library_compat.whole_modules(model) == [type(model.model.layers[0]).__name__]


def test_a_configuration_tells_the_attention_that_runs(tiny_model):
    model = tiny_model("llama")
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert library_compat.attention(model.config) == name


def test_hooks_of_torch_and_of_accelerate_are_noticed():
    from accelerate.hooks import ModelHook, add_hook_to_module

    assert not library_compat.is_hooked(nn.Linear(2, 2))
    before, after, moved = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    before.register_forward_pre_hook(lambda module, inputs: None)
    after.register_forward_hook(lambda module, inputs, output: None)
    add_hook_to_module(moved, ModelHook())
    assert all(map(library_compat.is_hooked, (before, after, moved)))


def test_finds_the_configuration_of_the_text_part_behind_an_adapter(tiny_model):
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    assert library_compat.text_config(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))) is model.config


def test_a_model_with_dynamic_rope_forgets_the_longest_text(tiny_model):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = tiny_model("llama", max_position_embeddings=16, rope_parameters=rope)
    short, long = torch.arange(3, 23)[None], torch.arange(3, 63)[None]
    with torch.no_grad():
        fresh = model(short).logits
        model(long)
        assert not torch.allclose(model(short).logits, fresh)  # or there would be nothing to forget
        library_compat.forget_lengths(model)
        assert torch.equal(model(short).logits, fresh)


def test_4_bit_layers_have_the_switch_for_packing_and_it_is_turned_off():
    from bitsandbytes.nn import Linear4bit

    layer = nn.Sequential(Linear4bit(64, 64, compute_dtype=torch.bfloat16))
    assert hasattr(layer[0], "support_avx512bf16_for_cpu")
    layer[0].support_avx512bf16_for_cpu = True
    library_compat.keep_4_bit_layers_unpacked(layer)
    assert layer[0].support_avx512bf16_for_cpu is False


def test_definitions_of_tasks_load_with_and_without_their_functions():
    path = registry.definition_file("hellaswag")
    as_text = lm_eval_compat.load_yaml(path, resolve_func=False)["process_docs"]
    assert isinstance(as_text, str) and callable(lm_eval_compat.load_yaml(path, resolve_func=True)["process_docs"])


def test_lm_eval_renders_templates_through_the_cache(monkeypatch):
    from lm_eval import utils

    monkeypatch.setattr(utils.env, "from_string", utils.env.from_string)
    lm_eval_compat.compile_templates_once()
    for animal in ("fox", "owl"):
        assert utils.apply_template("the {{animal}}", {"animal": animal}) == f"the {animal}"
    assert utils.env.from_string.cache_info().hits >= 1
