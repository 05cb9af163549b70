"""The text tower of image-text models is pruned like a causal language model; the vision tower stays as it is."""

import copy

import pytest
import torch

from coppice import models
from coppice.core.errors import CheckpointError, SettingsError
from coppice.models import intake, kinds, pruned_shapes
from coppice.stages import prune
from tests.unit import tiny_image_text as tiny

KIND = kinds.named("image-text")
QWEN = ("qwen3_vl", "qwen2_5_vl", "qwen2_vl")
POINTS = {
    "depth": {"method": "depth", "ratio": 0.5},
    "depth by perplexity": {"method": "depth", "ratio": 0.25, "importance": "perplexity"},
    "depth by taylor": {"method": "depth", "ratio": 0.25, "importance": "taylor"},
    "channels": {"method": "width", "ratio": 0.5},
    "channels and heads": {"method": "width", "ratio": 0.5, "importance": "activation", "parts": ["mlp", "attention"]},
    "global": {"method": "width", "ratio": 0.4, "importance": "taylor", "ranking": "global"},
    "wanda": {"method": "unstructured", "ratio": 0.5},
    "sparsegpt": {"method": "unstructured", "ratio": 0.5, "importance": "sparsegpt", "pattern": "2:4"},
}


def batches():
    return [torch.randint(12, 100, (2, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def seen_by(model):
    """Return the logits of the probe with a picture."""
    with torch.no_grad():
        return KIND.outputs(model, KIND.probes(model)[-1])


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", QWEN)
def test_a_pruned_text_tower_is_saved_and_loads_again_and_the_vision_tower_is_untouched(name, point, tmp_path):
    model = copy.deepcopy(tiny.build(name))
    before = {key: tensor.clone() for key, tensor in model.model.visual.state_dict().items()}
    parameters = models.parameters(model)
    result = prune.prune(model, POINTS[point], batches())
    after = model.model.visual.state_dict()
    assert before.keys() == after.keys() and all(after[key].equal(tensor) for key, tensor in before.items())
    source = tiny.save(name, tmp_path / "dense")
    models.save(result.model, models.Source(str(source)).reader(), tmp_path / "pruned")
    again = models.load(models.Source(str(tmp_path / "pruned"), dtype="float32"))
    torch.testing.assert_close(seen_by(again), seen_by(model), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(seen_by(again), seen_by(tiny.build(name)), atol=1e-3)
    assert models.count_parameters(tmp_path / "pruned") == models.parameters(model)
    assert (models.parameters(model) < parameters) == (POINTS[point]["method"] != "unstructured")
    odd = (tmp_path / "pruned" / pruned_shapes.MANIFEST).exists()
    fixed = name != "qwen3_vl" and point == "channels and heads"
    assert odd == (point == "global" or fixed)
    if not odd:
        plain = KIND.auto_class().from_pretrained(tmp_path / "pruned").eval()
        torch.testing.assert_close(seen_by(plain), seen_by(model), rtol=1e-5, atol=1e-6)


def test_the_blocks_that_get_features_of_the_vision_tower_stay():
    model = copy.deepcopy(tiny.build("qwen3_vl"))
    first = model.model.language_model.layers[0]
    with torch.no_grad():  # an influence of nothing: without protection it would be the first to go
        for weight in (first.self_attn.o_proj.weight, first.mlp.down_proj.weight):
            weight.zero_()
    result = prune.prune(model, {"method": "depth", "ratio": 0.75}, batches())
    assert result.facts["removed"]["layers"] == [1, 2, 3] and model.model.language_model.layers[0] is first
    config = tiny.build("qwen3_vl").config
    with pytest.raises(SettingsError, match="would leave none but those of keep_blocks, and 3 are free"):
        prune.resolve({"method": "depth", "ratio": 0.95}, config)


def test_a_model_whose_text_tower_is_not_known_says_what_can_be_done():
    with pytest.raises(CheckpointError, match=r"cannot prune models of type 'llava' .* list the checkpoints in"):
        prune.resolve({"method": "depth", "ratio": 0.5}, tiny.build("llava").config)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_a_checkpoint_is_taken_in_with_the_sizes_of_its_text_tower(name, tmp_path):
    folder = tiny.save(name, tmp_path / "dense")
    facts = intake.check(str(folder), intake.Needs(prompt="chat"))
    assert facts["context_length"] == tiny.TEXT["max_position_embeddings"]
    assert facts["tokenizer"]["rows"] == tiny.TEXT["vocab_size"]


def test_a_checkpoint_without_an_image_processor_or_whose_template_shows_no_picture_is_refused(tmp_path):
    folder, needs = tiny.save("qwen3_vl", tmp_path / "dense"), intake.Needs(prompt="chat")
    template = folder / "chat_template.jinja"
    text = template.read_text()
    for broken, reason in (
        (text.replace("<|image_pad|>", ""), r"writes 0 times <\|image_pad\|> for one picture"),
        ("{{ raise_exception('no lists') }}", r"takes no picture \(no lists\)"),
    ):
        template.write_text(broken)
        with pytest.raises(SettingsError, match=rf"its chat template {reason}.*set models\.X\.prompt to none"):
            intake.check(str(folder), needs)
        intake.check(str(folder), intake.Needs(prompt="none"))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"image processor does not load.*Copy preprocessor_config\.json"):
        intake.check(str(folder), needs)


def test_a_config_that_does_not_fit_the_weights_of_the_text_tower_is_refused(tmp_path):
    import json

    folder = tiny.save("qwen3_vl", tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="num_hidden_layers is 3, but the weights have a layer 3"):
        models.load(models.Source(str(folder)))
