"""Which linear layers an adapter takes in architectures that have other names for them than Llama."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from coppice.core.errors import SettingsError
from coppice.models import kinds
from coppice.stages.recover import lora, target_names
from coppice.study.settings import lora_presets
from coppice.study.settings.sections.finetune import Lora
from tests.architectures import tiny

KIND = kinds.named("causal-lm")


def skeleton(title):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny.configuration(title))


def adapted(title, wanted):
    """Return the last two names of the layers that get an adapter from peft, and the peft model."""
    settings = Lora.model_validate(lora_presets.resolve(Lora(target_modules=wanted, dropout=0.1).model_dump()))
    model = skeleton(title)
    model = get_peft_model(model, lora.lora_config(model, KIND, settings))
    found = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    return {".".join(name.split(".")[-2:]) for name in found}, model


ATTENTION = {
    "GPT-2": {"attn.c_attn", "attn.c_proj"},
    "GPT-J": {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"},
    "GPT-NeoX": {"attention.query_key_value", "attention.dense"},
    "Falcon": {"self_attention.query_key_value", "self_attention.dense"},
    "BLOOM": {"self_attention.query_key_value", "self_attention.dense"},
    "MPT": {"attn.Wqkv", "attn.out_proj"},
    "Phi": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"},
    "Phi-3": {"self_attn.qkv_proj", "self_attn.o_proj"},
    "OPT": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"},
    "Mixtral": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"},
}
MLP = {
    "GPT-2": {"mlp.c_fc", "mlp.c_proj"},
    "GPT-J": {"mlp.fc_in", "mlp.fc_out"},
    "GPT-NeoX": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "MPT": {"ffn.up_proj", "ffn.down_proj"},
    "StarCoder2": {"mlp.c_fc", "mlp.c_proj"},
    "OPT": {f"{layer}.{name}" for layer in range(4) for name in ("fc1", "fc2")},
    "Qwen2-MoE": {f"shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
}


@pytest.mark.parametrize(
    ("title", "group", "layers"),
    [(title, "attention", layers) for title, layers in ATTENTION.items()]
    + [(title, "mlp", layers) for title, layers in MLP.items()],
)
def test_a_group_is_found_by_where_its_layers_lie(title, group, layers):
    assert adapted(title, group)[0] == layers


def test_adapters_of_a_model_that_also_sees_lie_in_the_part_that_reads():
    for wanted in ("all-linear", "attention", ["q_proj"]):
        _, model = adapted("Gemma 3 (with images)", wanted)
        names = [name for name, _ in model.named_parameters() if "lora_A" in name]
        assert names and all("language_model" in name for name in names)


def test_all_linear_leaves_out_what_a_kernel_of_mamba_reads_directly():
    assert adapted("Mamba", "all-linear")[0] == {"mixer.in_proj", "mixer.x_proj", "mixer.dt_proj"}


@pytest.mark.parametrize(("title", "wanted"), [("Mamba", "attention"), ("GPT-2", ["q_proj"]), ("Mamba", ["out_proj"])])
def test_names_the_layers_of_a_model_without_the_wanted_ones(title, wanted):
    with pytest.raises(SettingsError, match=r"target_modules: '\w+' matches no .*all-linear, or choose from \w+"):
        target_names.target_modules(skeleton(title), KIND, wanted)


def test_asks_for_no_dropout_on_experts_in_one_tensor():
    settings = Lora.model_validate(lora_presets.resolve(Lora().model_dump()))
    with pytest.raises(SettingsError, match=r"finetune\.lora\.dropout: the experts .*Set it to 0"):
        lora._with_adapter(skeleton("Mixtral"), KIND, settings)


def test_names_of_earlier_records_stay_the_same():
    """The names are part of adapter_config.json, so that another order would change an adapter's fingerprint."""
    model = skeleton("Llama")
    assert target_names.target_modules(model, KIND, "attention") == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert target_names.target_modules(model, KIND, ["mlp", "v_proj"]) == [
        "gate_proj",
        "up_proj",
        "down_proj",
        "v_proj",
    ]
    assert target_names.target_modules(model, KIND, ["self_attn.q_proj"]) == ["self_attn.q_proj"]
    assert target_names.target_modules(model, KIND, "all-linear") == "all-linear"
