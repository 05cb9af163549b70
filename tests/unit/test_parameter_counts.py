"""A checkpoint has as many parameters as the model that plain transformers loads from it, whatever its files hold."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from coppice import models
from coppice.core.errors import CheckpointError
from coppice.models import estimates

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
ARCHITECTURES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "phi": {},
    "phi3": {},
    "stablelm": {},
    "starcoder2": {},
    "gpt_neox": {},
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_head": 4, "n_layer": 2},
    "mixtral": {"num_local_experts": 4},  # stores experts one by one and computes with them together
    "mamba": {"state_size": 4},
}


def true_count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def saved(architecture, folder, form="safetensors", **changes):
    """Save a random model and return the number of its parameters, as plain transformers loads it again."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(architecture, **SMALL | ARCHITECTURES[architecture] | changes)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size="20KB" if form == "shards" else "1GB")
    if (
        form == "bin"
    ):  # as older versions of transformers saved: every name of the state dict, tied ones and buffers too
        tensors = load_file(folder / "model.safetensors")
        tensors |= {name: tensor for name, tensor in model.state_dict().items() if "experts" not in name}
        torch.save(tensors, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return true_count(AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_counts_the_parameters_of_the_model_that_the_files_load_as(architecture, form, tmp_path):
    for tied in (True, False):
        folder = tmp_path / str(tied)
        expected = saved(architecture, folder, form, tie_word_embeddings=tied)
        assert models.count_parameters(folder) == expected
    assert models.count_parameters(tmp_path / "True") < models.count_parameters(tmp_path / "False")


def rewritten(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_counts_neither_a_copied_output_layer_nor_old_buffers(tmp_path):
    expected = saved("llama", tmp_path, tie_word_embeddings=True)
    head, buffer = "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewritten(tmp_path, lambda t: t.update({head: t["model.embed_tokens.weight"].clone(), buffer: torch.ones(4)}))
    assert models.count_parameters(tmp_path) == expected


def test_counts_an_output_layer_that_differs_although_config_json_ties_it(tmp_path):
    from transformers import AutoModelForCausalLM

    tied = saved("mistral", tmp_path, tie_word_embeddings=True)
    rewritten(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    loaded = true_count(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert models.count_parameters(tmp_path) == loaded == tied + 96 * 32


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_counts_layers_of_other_widths_than_config_json_says_by_their_tensors(tmp_path, form):
    full = saved("phi", tmp_path, form)  # no architecture of `pruned_shapes`
    read, name = (torch.load, "pytorch_model.bin") if form == "bin" else (load_file, "model.safetensors")
    tensors = read(tmp_path / name)
    for linear, dim in (("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)):
        key = f"model.layers.1.mlp.{linear}"
        tensors[key] = tensors[key].narrow(dim, 0, 40).contiguous()
    torch.save(tensors, tmp_path / name) if form == "bin" else save_file(tensors, tmp_path / name, {"format": "pt"})
    assert models.count_parameters(tmp_path) == full - 8 * (2 * 32 + 1)


def test_counts_a_pruned_checkpoint_of_uneven_layers_as_it_loads(tiny_checkpoint):
    folder = tiny_checkpoint("llama")

    def edit(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.2.self_attn.")]:
            del tensors[name]  # the whole attention of a layer
        for name, width in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            key = f"model.layers.1.mlp.{name}.weight"
            tensors[key] = tensors[key].narrow(width, 0, 24).contiguous()

    rewritten(folder, edit)
    assert models.count_parameters(folder) == true_count(models.load(models.Source(str(folder))))


def test_counts_an_unknown_architecture_by_its_files_and_runs_none_of_its_code(tmp_path, caplog):
    expected = saved("llama", tmp_path, tie_word_embeddings=True)
    (tmp_path / "own.py").write_text("raise RuntimeError('ran')\n")
    config = json.loads((tmp_path / "config.json").read_text())
    changes = {"model_type": "unheard-of", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    assert models.count_parameters(tmp_path) == expected
    assert "counting the tensors of its files" in caplog.text


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_counts_the_parameters_of_a_quantized_model_as_if_unpacked(tmp_path, bits):
    expected = saved("llama", tmp_path)
    model = models.load(models.Source(str(tmp_path), quantize=bits))
    assert models.parameters(model) == expected == models.count_parameters(tmp_path)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True, "bias": "all"}])
def test_an_adapter_does_not_change_the_number_of_parameters_of_its_base(tiny_checkpoint, options):
    from peft import LoraConfig, get_peft_model

    from coppice.models import adapters

    model = models.load(models.Source(str(tiny_checkpoint("llama"))))
    before = models.parameters(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], **options))
    assert models.parameters(adapted) - adapters.parameters(adapted) == before


def test_refuses_a_state_dict_inside_another_one(tmp_path):
    """A candidate with such a file would be refused only when it is loaded to be scored."""
    saved("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    torch.save({"state_dict": load_file(path), "epoch": 3}, tmp_path / "pytorch_model.bin")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no tensors at the top level, only state_dict, epoch\."):
        models.count_parameters(tmp_path)


@pytest.mark.parametrize("name", ["T5Config", "BartConfig", "CLIPConfig", "SiglipConfig", "Qwen3VLConfig"])
def test_the_estimate_of_a_model_with_two_towers_is_near_its_number_of_parameters(name):
    import torch
    import transformers

    config = getattr(transformers, name)()
    with torch.device("meta"):
        exact = sum(parameter.numel() for parameter in transformers.AutoModel.from_config(config).parameters())
    estimate = estimates.shape_in(config.to_diff_dict() | config.to_dict()).parameters
    assert 0.9 < estimate / exact < 1.25, (estimate, exact)
