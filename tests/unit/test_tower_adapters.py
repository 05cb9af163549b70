"""One adapter whose towers have their own ranks, learning rates and layers, or are frozen or trained whole."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_dual_training import captioned, prepared, train
from test_finetuning import SETTINGS

from coppice import models
from coppice.core.errors import CoppiceError, SettingsError
from coppice.stages.recover import lora, tower_adapters
from coppice.stages.recover.engine import learning_rates
from coppice.stages.recover.training_request import TrainingSettings
from coppice.study.settings import ablations, arms, lora_presets
from coppice.study.settings.sections.ablation import Arm
from coppice.study.settings.sections.finetune import Finetune, Lora
from tests.unit import tiny_dual_encoders, tiny_image_text, tiny_seq2seq


def settings_of(towers, **changes):
    given = Lora.model_validate({"r": 2, "alpha": 4, "dropout": 0.0, "towers": towers} | changes)
    return Lora.model_validate(lora_presets.resolve(given.model_dump()))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Return a function name -> source of a tiny model."""
    found = {}

    def of(name):
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            if name in ("clip", "siglip"):
                tiny_dual_encoders.save(name, folder)
            elif name in tiny_seq2seq.ARCHITECTURES:
                tiny_seq2seq.save(folder, name)
            else:
                tiny_image_text.save(name, folder)
            found[name] = models.Source(str(folder))
        return found[name]

    return of


def adapted(source, towers, **changes):
    kind = models.kind_of(source)
    model = lora._with_adapter(models.load(source), kind, settings_of(towers, **changes))
    ranks = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A") and "default" in module.r:
            ranks.setdefault(kind.tower_of(name), set()).add(
                (name.split(".")[-1], module.r["default"], module.lora_alpha["default"])
            )
    return model, kind, ranks


CASES = [
    ("clip", {"vision": {"r": 6, "alpha": 3}}, {"text": (2, 4), "vision": (6, 3)}),
    ("clip", {"text": {"r": 1}, "vision": {"alpha": 9}}, {"text": (1, 4), "vision": (2, 9)}),
    ("siglip", {"text": "frozen", "vision": {"r": 3}}, {"vision": (3, 4)}),
    ("flan-t5", {"decoder": {"r": 5}}, {"encoder": (2, 4), "decoder": (5, 4)}),
    ("bart", {"encoder": {"r": 5}}, {"encoder": (5, 4), "decoder": (2, 4)}),
    ("qwen3_vl", {}, {"text": (2, 4)}),
    ("qwen3_vl", {"vision": {"r": 5}, "projector": {}}, {"text": (2, 4), "vision": (5, 4), "projector": (2, 4)}),
    ("llava", {"vision": {"r": 5}, "projector": {"r": 3}, "text": "frozen"}, {"vision": (5, 4), "projector": (3, 4)}),
]


@pytest.mark.parametrize(("name", "towers", "expected"), CASES)
def test_each_tower_has_its_own_rank_and_alpha_and_plain_peft_reads_them(sources, tmp_path, name, towers, expected):
    source = sources(name)
    model, kind, ranks = adapted(source, towers)
    assert {tower: {one[1:] for one in found} for tower, found in ranks.items()} == {
        t: {e} for t, e in expected.items()
    }
    skeleton = models.skeleton(source)
    settings = TrainingSettings.model_validate({"lora": settings_of(towers).model_dump()})
    assert lora.Lora().predict(skeleton, kind, settings) == model.get_nb_trainable_parameters()[0]
    assert sum(tower_adapters.trainable(model, kind).values()) == model.get_nb_trainable_parameters()[0]
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0, 0.1)
    model.save_pretrained(tmp_path / "out")
    plain = PeftModel.from_pretrained(kind.auto_class().from_pretrained(source.path), tmp_path / "out").eval()
    probe = kind.probes(model)[-1]
    with torch.no_grad():
        before = kind.outputs(model.eval(), probe)
        assert torch.equal(before, kind.outputs(plain, probe))
        merged = kind.outputs(plain.merge_and_unload(), probe)
    torch.testing.assert_close(merged, before, rtol=1e-3, atol=1e-4)


def test_each_tower_has_its_own_layers(sources):
    towers = {"text": {"target_modules": ["q_proj", "fc1"]}, "vision": {"target_modules": "attention"}}
    _, _, ranks = adapted(sources("clip"), towers)
    assert {name for name, *_ in ranks["text"]} == {"q_proj", "fc1"}
    assert {name for name, *_ in ranks["vision"]} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    _, _, ranks = adapted(sources("siglip"), {}, target_modules=["out_proj", "fc1", "fc2"])
    assert {name for found in ranks.values() for name, *_ in found} == {"out_proj", "fc1", "fc2"}
    _, _, ranks = adapted(sources("clip"), {}, target_modules="mlp")
    assert {name for found in ranks.values() for name, *_ in found} == {"fc1", "fc2"}


@pytest.mark.parametrize("name", ["clip", "siglip", "flan-t5", "t5", "bart", "qwen3_vl"])
def test_a_full_tower_trains_all_of_its_weights_and_plain_peft_reads_them(sources, tmp_path, name):
    source = sources(name)
    kind = models.kind_of(source)
    whole, other = {"clip": ("vision", "text"), "siglip": ("vision", "text"), "qwen3_vl": ("projector", "text")}.get(
        name, ("encoder", "decoder")
    )
    model, _, ranks = adapted(source, {whole: "full", other: "frozen"})
    assert not ranks
    loaded = models.load(source)
    names = {}
    for parameter_name, parameter in loaded.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(parameter_name)
    own = [found for found in names.values() if all(kind.tower_of(one) == whole for one in found)]
    expected = sum(loaded.get_parameter(found[0]).numel() for found in own)
    if name in ("clip", "siglip"):
        expected -= sum(
            p.numel() for n, p in loaded.named_parameters() if n.startswith("logit_") and kind.tower_of(n) == whole
        )
    assert model.get_nb_trainable_parameters()[0] == expected
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05
    model.save_pretrained(tmp_path / "out")
    plain = PeftModel.from_pretrained(kind.auto_class().from_pretrained(source.path), tmp_path / "out").eval()
    probe = kind.probes(model)[-1]
    with torch.no_grad():
        found, untrained = kind.outputs(plain, probe), kind.outputs(loaded, probe)
        assert torch.equal(kind.outputs(model.eval(), probe), found) and not torch.allclose(found, untrained)


def test_learning_rates_of_towers_are_recorded_and_survive_a_resume(sources, tmp_path):
    dataset = prepared(tmp_path, "mine", captioned())
    how = {"lora": {"dropout": 0.1, "towers": {"vision": {"learning_rate": 3e-2}, "text": {"r": 3}}}}
    record = train(sources("clip"), dataset, tmp_path / "out", **how)
    assert record["settings"]["lora"]["towers"]["vision"]["learning_rate"] == 3e-2
    assert set(record["trainable_by_tower"]) == {"text", "vision"}
    state = torch.load(tmp_path / "out/checkpoint-6/optimizer.pt", weights_only=True)
    assert {group["initial_lr"] for group in state["param_groups"]} == {1e-2, 3e-2}
    train(sources("clip"), dataset, tmp_path / "again", stop_share=0.5, **how)
    assert not (tmp_path / "again/adapter_model.safetensors").exists()
    train(sources("clip"), dataset, tmp_path / "again", **how)
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(expected[name], tensor) for name, tensor in found.items())
    alike = {"lora": {"dropout": 0.1, "towers": {"text": {"r": 3}}}}
    train(sources("clip"), dataset, tmp_path / "alike", **alike)
    other = load_file(tmp_path / "alike/adapter_model.safetensors")
    assert any(not torch.equal(other[name], tensor) for name, tensor in found.items() if "vision" in name)


def test_a_schedule_scales_each_learning_rate():
    first, second = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([{"params": [first, second], "weight_decay": 0.5}, {"params": []}], lr=0.1)
    learning_rates.split(optimizer, {0.3: [second]})
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for expected in ((0.1, 0.3), (0.05, 0.15)):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)
        optimizer.step()
        schedule.step()
    assert [group["params"] for group in optimizer.param_groups] == [[first], [second]]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "towers", "changes", "message"),
    [
        ("clip", {"vision": "frozen", "text": "frozen"}, {}, "all towers are frozen"),
        (
            "clip",
            {"encoder": {"r": 2}},
            {},
            r"towers\.encoder: a dual encoder has no such tower\. Name one of text, vision",
        ),
        (
            "qwen3_vl",
            {"vision": {"target_modules": ["q_proj"]}},
            {},
            r"towers\.vision\.target_modules: 'q_proj' matches no .*choose from .*qkv",
        ),
        (
            "qwen3_vl",
            {"vision": {}},
            {"target_modules": ["q_proj"]},
            r"towers\.vision: finetune\.lora\.target_modules .* matches no linear layer of this tower",
        ),
        ("qwen3_vl", {}, {"target_modules": ["qkv"]}, r"'qkv' matches no linear layer of the tower 'text'"),
        (
            "clip",
            {"vision": {"r": 3}},
            {"init": "olora", "use_rslora": True},
            "olora with use_rslora and towers of different ranks",
        ),
    ],
)
def test_names_what_does_not_fit(sources, name, towers, changes, message):
    with pytest.raises(SettingsError, match=message):
        adapted(sources(name), towers, **changes)


def test_a_rank_that_peft_did_not_take_is_an_error(sources):
    """Peft only warns of patterns that match nothing, and the layers then have the usual rank."""
    source = sources("clip")
    kind, model = models.kind_of(source), models.load(source)
    planned = tower_adapters.plan(model, kind, settings_of({"vision": {"r": 6}}))
    wrong = tower_adapters.Plan(
        planned.targets, planned.ranks, planned.alphas, {"vision_model": next(iter(planned.ranks))}
    )
    with pytest.warns(RuntimeWarning, match="did not match any"):
        found = get_peft_model(model, lora.lora_config(model, kind, settings_of({}), wrong))
    with pytest.raises(CoppiceError, match=r"got rank 2 and alpha 4.* instead of 6"):
        wrong.check(found)


def test_arms_of_an_ablation_may_give_towers_of_their_own():
    finetune = Finetune.model_validate(SETTINGS | {"lora": SETTINGS["lora"] | {"towers": {"text": "frozen"}}})
    below = arms.flat(finetune)
    entry = Arm.model_validate({"towers": {"vision": {"r": 32, "alpha": 64}, "text": "full"}})
    arm = ablations._agreeing(entry.given(), "arms[0]")
    assert arms.name_of(arm) == "towers-vision-r-32+alpha-64+text-full"
    given = arms.section(finetune, arms.resolved(arms.merged(below, arm)))
    found = TrainingSettings.model_validate(given).lora
    assert found.towers["vision"].r == 32 and found.towers["text"] == "full"
    usual = TrainingSettings.model_validate(arms.section(finetune, arms.resolved(arms.merged(below, {"r": 16}))))
    assert usual.lora.towers == {"text": "frozen"}
    with pytest.raises(SettingsError, match=r"arms\[0\]\.towers: is a setting of an adapter, but train is 'all'"):
        ablations._agreeing(Arm.model_validate({"train": "all", "towers": {"text": "full"}}).given(), "arms[0]")


GUIDE = {
    "conservative": ({"r": 32, "alpha": 64, "bias": "none"}, {"q_proj", "k_proj", "v_proj", "out_proj"}),
    "balanced": ({"r": 32, "alpha": 128, "bias": "lora_only"}, {"q_proj", "k_proj", "v_proj", "out_proj"}),
    "aggressive": (
        {"r": 64, "alpha": 128, "bias": "lora_only"},
        {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    ),
    "efficient": ({"r": 8, "alpha": 16, "bias": "none"}, {"q_proj", "v_proj"}),
}


@pytest.mark.parametrize("scheme", GUIDE)
def test_the_schemes_name_the_layers_of_both_encoders_that_the_guide_names(sources, scheme):
    expected, layers = GUIDE[scheme]
    settings = arms.merged(arms.flat(Finetune.model_validate(SETTINGS)), {"scheme": scheme, "dropout": 0.1})
    source = sources("clip")
    given = Lora.model_validate({key: settings[key] for key in lora_presets.DEFAULTS})
    assert {key: getattr(given, key) for key in expected} == expected and given.dropout == 0.1
    model = lora._with_adapter(models.load(source), models.kind_of(source), given)
    adapted_layers = [name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")]
    assert {name.split(".")[-1] for name in adapted_layers} == layers
    assert {name.split(".")[0] for name in adapted_layers} == {"text_model", "vision_model"}


def test_the_preset_of_captioners_adapts_all_attentions_of_t5(sources):
    given = Lora.model_validate(lora_presets.resolve(Lora(preset="captioner").model_dump()))
    assert (given.r, given.alpha, given.dropout) == (16, 32, 0.1)
    source = sources("flan-t5")
    model = lora._with_adapter(models.load(source), models.kind_of(source), given)
    names = [name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")]
    assert {name.split(".")[-1] for name in names} == {"q", "v"} and any("EncDecAttention" in name for name in names)
