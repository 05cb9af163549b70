"""An adapter goes onto a model whole, as plain peft trained it, or not at all."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from coppice import models
from coppice.core import fingerprints, records
from coppice.core.errors import CheckpointError
from coppice.models import adapters

IDS = torch.arange(3, 43).view(2, 20)
WEIGHTS = "adapter_model.safetensors"

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "all linear layers": {"target_modules": "all-linear"},
    "a regex": {"target_modules": r".*\.[01]\.self_attn\.[qk]_proj"},
    "some layers": {"target_modules": ["up_proj"], "layers_to_transform": [1]},
    "ranks by layer": {"target_modules": "all-linear", "rank_pattern": {"up_proj": 3}, "alpha_pattern": {"q_proj": 5}},
    "DoRA": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "biases of adapted layers": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "a head trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embeddings trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "an adapted embedding alone": {"target_modules": ["embed_tokens"]},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]},
}


@pytest.fixture
def new_adapter(tiny_checkpoint, tmp_path):
    """Return `build(base, **options)`: the folder of a random adapter, and the logits of the model that has it."""

    def build(base, **options):
        from peft import LoraConfig, get_peft_model

        options = {"r": 4, "task_type": "CAUSAL_LM"} | options
        model = get_peft_model(models.load(models.Source(str(base))), LoraConfig(**options))
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(1)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "magnitude" not in name:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
            logits = model.eval()(IDS).logits
        folder = tmp_path / "adapter"
        model.save_pretrained(folder)
        return folder, logits

    return build


@pytest.fixture
def base(tiny_checkpoint):
    return tiny_checkpoint("qwen2", num_hidden_layers=2)  # has biases


def logits_of(base, folder):
    with torch.no_grad():
        return models.load(models.Source(str(base)), folder)(IDS).logits


def configured(folder, **changes):
    """Change an adapter's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edited(folder, edit):
    """Replace the tensors of an adapter by what `edit` makes of them."""
    save_file(edit(load_file(folder / WEIGHTS)), folder / WEIGHTS)


@pytest.mark.parametrize("kind", KINDS)
def test_loads_every_kind_of_adapter_as_it_was_trained(base, new_adapter, kind):
    folder, expected = new_adapter(base, **KINDS[kind])
    assert torch.allclose(logits_of(base, folder), expected, atol=1e-5)


def named_by_state_dict(name):
    """Return the name that a tensor has in the state dict of the whole model, where it contains the adapter's name."""
    for factor in ("lora_A", "lora_B"):
        name = name.replace(f".{factor}.weight", f".{factor}.mine.weight")
    if name.endswith("magnitude_vector"):
        name += ".mine.weight"
    return name.replace("lm_head.weight", "lm_head.modules_to_save.mine.weight")


OLD = {
    "with the adapter's name": named_by_state_dict,
    "without a prefix": lambda name: name.removeprefix("base_model.model."),
    "with neither": lambda name: named_by_state_dict(name).removeprefix("base_model.model."),
}


@pytest.mark.parametrize("names", OLD)
def test_loads_adapters_whose_tensors_have_older_names(base, new_adapter, names):
    options = {"target_modules": "all-linear", "use_dora": True, "modules_to_save": ["lm_head"]}
    folder, expected = new_adapter(base, **options)
    edited(folder, lambda tensors: {OLD[names](name): tensor for name, tensor in tensors.items()})
    assert torch.allclose(logits_of(base, folder), expected, atol=1e-5)


def test_loads_an_adapter_in_a_bin_file(base, new_adapter):
    folder, expected = new_adapter(base, **KINDS["all linear layers"])
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    assert torch.allclose(logits_of(base, folder), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "sizes", "words"),
    [
        ("qwen2", {"num_hidden_layers": 1}, r"14 tensors without a place in the model: .*layers\.1\."),
        ("qwen2", {"num_hidden_layers": 3}, r"14 tensors missing: .*layers\.2\."),
        (
            "qwen2",
            {"num_hidden_layers": 2, "intermediate_size": 40},
            r"6 tensors of another shape: .*\(4, 48\) instead",
        ),
        ("gpt2", {"n_layer": 2, "n_embd": 32, "n_head": 8}, "does not fit"),
    ],
    ids=["fewer layers", "more layers", "other widths", "another architecture"],
)
def test_rejects_an_adapter_of_another_model(base, new_adapter, tiny_checkpoint, architecture, sizes, words):
    folder, _ = new_adapter(base, target_modules=LINEARS)
    configured(folder, base_model_name_or_path=None)
    other = tiny_checkpoint(architecture, **sizes)
    with pytest.raises(CheckpointError, match=words) as raised:
        models.load(models.Source(str(other)), folder)
    assert str(raised.value).startswith(f"{folder}: ") and str(other) in str(raised.value)


def test_rejects_a_base_with_other_tensors_than_the_one_that_the_adapter_names(base, new_adapter, tiny_checkpoint):
    # peft stores few layers by their full names, so that every tensor finds its place in the deeper model
    folder, _ = new_adapter(base, target_modules="all-linear")
    other = tiny_checkpoint("qwen2", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=f"trained on {base}, but {other} has other tensors"):
        models.load(models.Source(str(other)), folder)


DAMAGE = {
    "a missing factor": (
        lambda t: {n: v for n, v in t.items() if "0.self_attn.q_proj.lora_A" not in n},
        "1 tensors missing: .*lora_A",
    ),
    "a missing trained module": (lambda t: {n: v for n, v in t.items() if "lm_head" not in n}, "lm_head.* is missing"),
    "a tensor of something else": (lambda t: t | {"base_model.model.extra": torch.ones(2)}, "without a place.*extra"),
    "a trained module of another vocabulary": (
        lambda t: t | {"base_model.model.lm_head.weight": torch.ones(130, 32)},
        r"lm_head.*\(130, 32\) instead of \(128, 32\)",
    ),
    "no tensor": (lambda t: {}, "holds no adapter"),
    "NaN": (lambda t: {n: v * float("nan") for n, v in t.items()}, "not finite numbers.*learning_rate"),
    "zeros": (lambda t: {n: v * 0 for n, v in t.items() if "lm_head" not in n}, "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_rejects_an_adapter_that_is_not_whole(base, new_adapter, damage):
    folder, _ = new_adapter(base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    edit, words = DAMAGE[damage]
    edited(folder, edit)
    with pytest.raises(CheckpointError, match=words):
        models.load(models.Source(str(base)), folder)


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin"])
def test_names_a_truncated_file_without_advising_unsafe_loading(base, new_adapter, name):
    folder, _ = new_adapter(base, target_modules=["q_proj"])
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    if name != WEIGHTS:
        (folder / WEIGHTS).unlink()
    (folder / name).write_bytes((folder / name).read_bytes()[:500])
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read.*Copy it again") as raised:
        models.load(models.Source(str(base)), folder)
    assert "weights_only" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task_type": "SEQ_CLS"}, "trained for another task"),
        ({"peft_type": "IA3"}, "only LoRA adapters"),
        ({"peft_type": None}, "only LoRA adapters"),
        ({"target_modules": ["q_proj"]}, "without a place in the model"),
        ({"target_modules": ["nothing"]}, "does not fit"),
    ],
)
def test_rejects_a_configuration_of_another_adapter(base, new_adapter, change, words):
    folder, _ = new_adapter(base, target_modules=["q_proj", "k_proj"])
    configured(folder, **change)
    with pytest.raises(CheckpointError, match=words):
        models.load(models.Source(str(base)), folder)


def trained_on(folder, base):
    """Write the record of a training of the adapter in `folder` on `base`."""
    prints = {"fingerprints": {"weights": fingerprints.weights(base)}}
    content = {"trained_fingerprint": fingerprints.weights(folder), "provenance": prints}
    records.write(folder / "finetuning_config.json", content)


def test_rejects_a_base_other_than_the_one_that_the_adapter_was_trained_on(base, new_adapter, tiny_checkpoint):
    folder, expected = new_adapter(base, target_modules=["q_proj"])
    trained_on(folder, base)
    assert torch.allclose(logits_of(base, folder), expected, atol=1e-5)
    other = tiny_checkpoint("qwen2", num_hidden_layers=2, seed=1)  # the same shapes
    with pytest.raises(CheckpointError, match=f"trained on {base} .*but {other} has other weights"):
        models.load(models.Source(str(other)), folder)


def test_accepts_the_base_in_other_shards(base, new_adapter, tmp_path):
    folder, expected = new_adapter(base, target_modules=["q_proj"])
    trained_on(folder, base)
    models.load(models.Source(str(base))).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert torch.allclose(logits_of(tmp_path / "sharded", folder), expected, atol=1e-5)


def test_rejects_an_adapter_that_was_changed_after_its_training(base, new_adapter):
    folder, _ = new_adapter(base, target_modules=["q_proj"])
    trained_on(folder, base)
    edited(folder, lambda tensors: {name: tensor * 2 for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match="changed after training"):
        models.load(models.Source(str(base)), folder)


def test_warns_of_an_adapter_without_a_record_on_another_base(base, new_adapter, tiny_checkpoint, caplog):
    folder, _ = new_adapter(base, target_modules=["q_proj"])
    other = tiny_checkpoint("qwen2", num_hidden_layers=2, seed=1)
    with caplog.at_level(logging.WARNING):
        logits_of(base, folder)
        assert "no record of its training" not in caplog.text  # it names this very folder as its base
        logits_of(other, folder)
    assert "no record of its training" in caplog.text and str(base) in caplog.text


def test_a_training_restores_only_an_adapter_that_fits(base, new_adapter):
    folder, _ = new_adapter(base, target_modules=["q_proj"])
    model = models.load(models.Source(str(base)), folder)
    edited(folder, lambda tensors: dict(list(tensors.items())[1:]))
    with pytest.raises(CheckpointError, match="missing"):
        adapters.fill(model, adapters.read(folder), folder)


def by_evaluation(base, folder, output):
    from coppice.stages import evaluate

    choice = {"perplexity": {"datasets": []}, "zero_shot": {"tasks": []}, "cost": {"enabled": False}}
    wanted = evaluate.Evaluate.model_validate(choice)
    request = evaluate.EvaluationRequest(
        {"model": "M", "config": "c", "stage": "finetuned"}, models.Source(str(base)), wanted, {}, output, folder
    )
    evaluate.evaluate(request)


def by_generate(base, folder, output):
    from coppice.cli import single_jobs

    single_jobs.generate(single_jobs.Questions(str(base), str(folder), ["w5"]))


def by_lm_eval(base, folder, output):
    from coppice.stages.evaluate.zero_shot.harness_model import PrefixTreeLM

    PrefixTreeLM(str(base), peft=str(folder))


@pytest.mark.parametrize("load", [by_evaluation, by_generate, by_lm_eval])
@pytest.mark.parametrize("recorded", [True, False])
def test_no_command_gives_numbers_of_an_adapter_on_another_base(
    base, new_adapter, tiny_checkpoint, tmp_path, monkeypatch, load, recorded
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    deeper = tiny_checkpoint("qwen2", num_hidden_layers=3)
    folder, _ = new_adapter(deeper, target_modules=LINEARS)
    if recorded:
        trained_on(folder, deeper)
    else:
        configured(folder, base_model_name_or_path="gone")
    words = "has other weights" if recorded else r"14 tensors without a place in the model: .*layers\.2\."
    with pytest.raises(CheckpointError, match=words):
        load(base, folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.json"))
