"""What `finetune.lora.towers` trains of an image-text model, whose towers share the names of their layers."""

import copy

import pytest
import torch

from coppice import models
from coppice.core.errors import SettingsError
from coppice.models import kinds
from coppice.stages.recover import TrainingSettings, lora
from tests.unit import tiny_image_text as tiny

KIND = kinds.named("image-text")
PLACES = {
    "qwen3_vl": {"text": "language_model", "vision": "visual", "projector": "merger"},
    "qwen2_5_vl": {"text": "language_model", "vision": "visual", "projector": "merger"},
    "llava": {"text": "language_model", "vision": "vision_tower", "projector": "multi_modal_projector"},
}


ADAPTER = {
    "r": 2,
    "alpha": 4,
    "dropout": 0.0,
    "target_modules": "all-linear",
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "init": "default",
}


def adapted(name, towers, checkpointing=False, **more):
    """Return a model with an adapter."""
    settings = TrainingSettings.model_validate(
        {"lora": ADAPTER | {"towers": towers} | more, "gradient_checkpointing": checkpointing}
    )
    model = copy.deepcopy(tiny.build(name))
    return lora.Lora().prepare(model, KIND, models.Source(""), settings, [])


def trained(model, name):
    """Return tower -> the names of its trained parameters."""
    found = {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            tower = next((tower for tower, place in reversed(PLACES[name].items()) if place in key), "?")
            found.setdefault(tower, []).append(key)
    return found


@pytest.mark.parametrize("name", PLACES)
def test_only_the_text_tower_has_an_adapter_unless_others_are_named(name):
    found = trained(adapted(name, {}), name)
    assert list(found) == ["text"] and all("lora_" in key for key in found["text"])


@pytest.mark.parametrize("name", PLACES)
def test_towers_have_ranks_of_their_own_and_projectors_train_whole(name):
    model = adapted(name, {"vision": {"r": 3, "alpha": 9}, "projector": "full"})
    found = trained(model, name)
    assert set(found) == {"text", "vision", "projector"}
    ranks = {
        tower: {parameter.shape[0] for key, parameter in model.named_parameters() if key in keys and "lora_A" in key}
        for tower, keys in found.items()
    }
    assert ranks == {"text": {2}, "vision": {3}, "projector": set()}
    assert not any("lora_" in key for key in found["projector"])


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_trained_tower_gets_a_gradient_also_with_gradient_checkpointing(name, checkpointing):
    model = adapted(name, {"vision": {"r": 3}, "projector": "full"}, checkpointing).train()
    loss = model(**KIND.probes(model)[-1]).logits.square().mean()
    loss.backward()
    without = [
        key
        for key, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or ("lora_B" in key and not parameter.grad.any()))
    ]
    # LLaVA's features are those of a layer before the last one, which then gets none
    assert not [key for key in without if name != "llava" or "encoder.layers.1" not in key]


@pytest.mark.parametrize("name", PLACES)
def test_a_frozen_text_tower_and_a_whole_vision_tower_are_possible_and_plain_peft_loads_them(name, tmp_path):
    from peft import PeftModel

    model = adapted(name, {"text": "frozen", "vision": "full", "projector": {}})
    found = trained(model, name)
    assert set(found) == {"vision", "projector"} and not any("lora_" in key for key in found["vision"])
    assert all("lora_" in key for key in found["projector"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.full_like(parameter, 0.01))
    model.eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(tiny.build(name)), tmp_path).eval()
    probe = KIND.probes(again)[-1]
    with torch.no_grad():
        assert not torch.allclose(again(**probe).logits, tiny.build(name)(**probe).logits, atol=1e-4)
        torch.testing.assert_close(again(**probe).logits, model(**probe).logits)


def test_a_name_that_only_the_other_tower_has_is_an_error_that_lists_those_of_the_tower():
    with pytest.raises(SettingsError, match=r"finetune\.lora\.target_modules: 'qkv' .* the tower 'text' .* q_proj"):
        adapted("qwen3_vl", {}, target_modules=["qkv"])
    with pytest.raises(SettingsError, match=r"towers\.vision\.target_modules: 'q_proj' .* the tower 'vision' .* qkv"):
        adapted("qwen3_vl", {"vision": {"target_modules": ["q_proj"]}})
    with pytest.raises(SettingsError, match=r"lora\.towers\.audio: an image-text model has no such tower"):
        adapted("qwen3_vl", {"audio": "frozen"})


def test_names_that_both_towers_have_mean_the_text_tower_alone():
    model = adapted("qwen2_5_vl", {}, target_modules=["gate_proj", "up_proj", "down_proj"])
    assert list(trained(model, "qwen2_5_vl")) == ["text"]
