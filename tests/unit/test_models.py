"""Loading a model: exactly the tensors of the checkpoint, or an error that lists them; an adapter must have effect."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from coppice import models
from coppice.core.errors import CheckpointError


def test_loads_a_checkpoint_as_plain_transformers_does(tiny_checkpoint):
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint("qwen2")
    ids = torch.tensor([[5, 6, 7]])
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
    assert torch.equal(models.load(models.Source(str(folder)))(ids).logits, expected)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight"), "missing.*up_proj"),
        (lambda t: t.update({"model.layers.0.mlp.extra": torch.zeros(2)}), "unexpected.*extra"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(8, 32)}), "up_proj"),
    ],
    ids=["a missing tensor", "an extra tensor", "another shape"],
)
def test_rejects_a_checkpoint_that_would_load_with_a_silent_mismatch(tiny_checkpoint, edit, words):
    folder = tiny_checkpoint("llama")
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        models.load(models.Source(str(folder)))


def test_names_the_folder_of_a_damaged_weights_file(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=str(folder)):
        models.load(models.Source(str(folder)))


def test_rejects_a_folder_that_is_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        models.load(models.Source(str(tmp_path)))


@pytest.mark.parametrize("acts", [True, False])
def test_rejects_an_adapter_that_changes_nothing(tiny_checkpoint, tmp_path, acts):
    from peft import LoraConfig, get_peft_model

    folder = tiny_checkpoint("llama")
    model = get_peft_model(models.load(models.Source(str(folder))), LoraConfig(target_modules="all-linear"))
    if acts:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    if acts:
        models.load(models.Source(str(folder)), tmp_path / "adapter")
    else:
        with pytest.raises(CheckpointError, match="changes nothing"):
            models.load(models.Source(str(folder)), tmp_path / "adapter")


def test_rejects_a_tokenizer_with_more_ids_than_the_model_has_rows(tiny_model, tiny_tokenizer):
    model = tiny_model("llama", vocab_size=64)
    with pytest.raises(CheckpointError, match=r"127.*64 rows"):
        models.check_vocabulary(model, tiny_tokenizer, "folder")
    models.check_vocabulary(tiny_model("llama", vocab_size=256), tiny_tokenizer, "folder")


def test_follows_a_models_record_from_another_working_directory(tmp_path, monkeypatch):
    from coppice.core import records

    (tmp_path / "study/resources/checkpoint").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "study")
    records.write("resources/model.json", {"path": "resources/checkpoint"})
    assert models.folder_of("resources/model.json") == "resources/checkpoint"
    monkeypatch.chdir(tmp_path)
    assert models.folder_of("study/resources/model.json") == "study/resources/checkpoint"
    records.write("elsewhere.json", {"path": "/models/mine"})
    assert models.folder_of("elsewhere.json") == "/models/mine"
