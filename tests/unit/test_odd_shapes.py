"""Checkpoints whose layers have different widths: what was saved is loaded, and what does not fit is rejected."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from coppice import models
from coppice.core.errors import CheckpointError
from coppice.models import footprint, pruned_shapes

IDS = torch.tensor([[5, 6, 9, 10, 77, 3, 40, 41], [9, 8, 7, 6, 5, 4, 3, 99]])
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral")


def cut(owner, name, rows=None, columns=None):
    """Keep the first `rows` and `columns` of a linear layer."""
    old = getattr(owner, name)
    weight = old.weight.data[:rows, :columns].clone()
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=old.bias is not None)
    new.weight.data = weight
    if old.bias is not None:
        new.bias.data = old.bias.data[:rows].clone()
    setattr(owner, name, new)


def narrow(layer, groups, per_group, channels, head=4):
    """Keep the first `groups` KV heads with `per_group` query heads each, and the first `channels` of the MLP."""
    attention, query = layer.self_attn, groups * per_group * head
    cut(attention, "q_proj", rows=query)
    for name in ("k_proj", "v_proj"):
        cut(attention, name, rows=groups * head)
    cut(attention, "o_proj", columns=query)
    attention.num_key_value_groups = per_group
    for name in ("gate_proj", "up_proj"):
        cut(layer.mlp, name, rows=channels)
    cut(layer.mlp, "down_proj", columns=channels)


@pytest.fixture(params=ARCHITECTURES)
def odd(request, tiny_model, tiny_tokenizer, tmp_path):
    """Return (model, folder it was saved to): four layers, only one of which has the widths of the configuration."""
    model = tiny_model(request.param)
    for index, widths in {0: (3, 2, 30), 1: (1, 2, 48), 3: (4, 1, 7)}.items():
        narrow(model.model.layers[index], *widths)
    model.save_pretrained(tmp_path / "odd")
    tiny_tokenizer.save_pretrained(tmp_path / "odd")
    return model, tmp_path / "odd"


def load(folder):
    return models.load(models.Source(str(folder)))


def test_loads_with_identical_logits_with_and_without_a_manifest(odd):
    model, folder = odd
    assert torch.equal(load(folder)(IDS).logits, model(IDS).logits)
    found = pruned_shapes.write_manifest(folder, model.config)
    assert set(found) == {0, 1, 3} and found[0] == {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "intermediate_size": 30,
    }
    assert set(json.loads((folder / pruned_shapes.MANIFEST).read_text())["per_layer_config"]) == {"0", "1", "3"}
    assert torch.equal(load(folder)(IDS).logits, model(IDS).logits)
    assert footprint.measure(load(folder)) == footprint.measure(model)


def test_generates_the_same_text_with_and_without_a_cache(odd):
    _, folder = odd
    model = load(folder)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(IDS[:1], use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


def test_loads_and_merges_an_adapter(odd, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    _, folder = odd
    model = get_peft_model(load(folder), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0.0, 0.1)
    expected = model.eval()(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    again = models.load(models.Source(str(folder)), tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, expected) and isinstance(again, PeftModel)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    pruned_shapes.write_manifest(tmp_path / "merged", merged.config)
    torch.testing.assert_close(load(tmp_path / "merged")(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norms", [True, False], ids=["norms kept", "norms dropped"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
def test_loads_layers_without_attention_or_mlp(tiny_model, tmp_path, architecture, norms):
    """A layer without attention or MLP equals one whose output projection is zero."""
    model = tiny_model(architecture)
    nn.init.zeros_(model.model.layers[0].self_attn.o_proj.weight)
    nn.init.zeros_(model.model.layers[2].mlp.down_proj.weight)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    gone = ["layers.0.self_attn", "layers.2.mlp"]
    gone += [] if norms else ["layers.0.input_layernorm", "layers.2.post_attention_layernorm"]
    kept = {name: tensor for name, tensor in state.items() if not any(part in name for part in gone)}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = load(tmp_path)
    torch.testing.assert_close(found(IDS).logits, model(IDS).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(found.generate(IDS[:1], **options), model.generate(IDS[:1], **options))


def test_tied_embeddings_stay_tied(tiny_model, tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    narrow(model.model.layers[1], 2, 2, 20)
    model.save_pretrained(tmp_path)
    found = load(tmp_path)
    assert torch.equal(found(IDS).logits, model(IDS).logits)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert models.parameters(found) == models.parameters(model)


def edit(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_rejects_a_manifest_that_contradicts_the_weights(odd):
    model, folder = odd
    pruned_shapes.write_manifest(folder, model.config)
    content = json.loads((folder / pruned_shapes.MANIFEST).read_text())
    content["per_layer_config"]["1"]["intermediate_size"] = 40
    (folder / pruned_shapes.MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"pruned_shapes\.json: layer 1 .*40 MLP channels.*48 MLP channels"):
        load(folder)
    (folder / pruned_shapes.MANIFEST).write_text('{"per_layer_config": {"1": ')
    with pytest.raises(CheckpointError, match="not a manifest"):
        load(folder)


def test_rejects_dense_weights_with_a_pruned_configuration(tiny_model, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    edit_config(tmp_path, intermediate_size=40)
    with pytest.raises(CheckpointError, match=r"48 MLP channels, but config\.json says .*40 MLP channels"):
        load(tmp_path)


def test_rejects_a_layer_wider_than_the_configuration(odd):
    _, folder = odd
    edit_config(folder, intermediate_size=32)
    with pytest.raises(CheckpointError, match=r"more than config\.json's"):
        load(folder)


def test_rejects_heads_that_do_not_fit_together(tiny_model, tmp_path):
    model = tiny_model("llama")
    narrow(model.model.layers[1], 2, 2, 20)
    model.save_pretrained(tmp_path)
    name = "model.layers.1.self_attn.q_proj.weight"
    edit(tmp_path, lambda state: state.update({name: state[name][:12]}))  # three query heads, two KV heads
    with pytest.raises(CheckpointError, match="layer 1 has 3 query heads and 2 KV heads"):
        load(tmp_path)
    edit(tmp_path, lambda state: state.update({name: state[name][:10]}))
    with pytest.raises(CheckpointError, match="not a multiple of head_dim 4"):
        load(tmp_path)


def test_names_a_missing_or_unexpected_tensor(odd):
    _, folder = odd
    edit(folder, lambda state: state.update({"model.layers.1.extra.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.extra\.weight"):
        load(folder)
    edit(folder, lambda state: [state.pop(k) for k in ("model.layers.1.extra.weight", "model.norm.weight")])
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load(folder)


def test_rejects_an_output_layer_that_differs_from_its_tied_embedding(tiny_model, tmp_path):
    model = tiny_model("llama")
    narrow(model.model.layers[1], 2, 2, 20)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="lm_head"):
        load(tmp_path)


def test_rejects_layers_with_a_missing_number(tiny_model, tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    edit(tmp_path, lambda state: [state.pop(k) for k in list(state) if ".layers.2." in k])
    with pytest.raises(CheckpointError, match=r"layer 2 has no tensor.*num_hidden_layers"):
        load(tmp_path)
