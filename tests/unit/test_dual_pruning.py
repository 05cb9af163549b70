"""Prune the encoders of CLIP and SigLIP: importance against plain loops, cuts against masks, and loading again."""

import copy

import pytest
import torch
from test_dual_training import captioned, prepared
from transformers import AutoModel

from coppice import models
from coppice.core.errors import CheckpointError, SettingsError
from coppice.models import kinds, pruned_shapes
from coppice.stages import prune
from coppice.stages.prune import importance
from coppice.stages.prune.candidates import calibration
from tests.unit import tiny_dual_encoders as tiny

KIND = kinds.named("dual-encoder")
TOWERS = ("text", "vision")
FAMILIES = ["clip", "siglip"]


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory):
    return models.Source(str(tiny.save(request.param, tmp_path_factory.mktemp(request.param))))


@pytest.fixture(scope="module")
def batches(source, tmp_path_factory):
    """Return calibration batches as a pruning draws them from rows."""
    record = prepared(tmp_path_factory.mktemp("rows"), "mine", captioned())
    asked = {"record": str(record), "dataset": "mine", "samples": 16, "length": 77, "windows": "running"}
    found, _ = calibration.batches(KIND, source.reader(), asked, 77, seed=0)
    assert 1 < sum(len(batch["keys"]) for batch in found) <= 16
    return found


def tower_of(model, name):
    return next(tower for tower in KIND.towers(model) if tower.anatomy.name == name)


def loss(model, batches):
    """Return the mean loss of all pairs by transformers' own loss, whose captions are distinct."""
    total = 0
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "pixel_values")}
        total = total + model(**inputs, return_loss=True).loss * len(batch["keys"])
    return total / sum(len(batch["keys"]) for batch in batches)


def outputs(model):
    with torch.no_grad():
        return torch.cat([KIND.outputs(model, probe) for probe in KIND.probes(model)])


@pytest.mark.parametrize("where", TOWERS)
def test_taylor_is_that_of_the_whole_models_gradients(source, batches, where):
    model = models.load(source)
    tower = tower_of(model, where)
    found = importance.taylor(tower, ["mlp", "attention"], batches)
    loss(model, batches).backward()
    for part, layers in found.items():
        for block, scores in zip(tower.blocks, layers, strict=True):
            expected = 0
            for coupling in tower.parts[part].couplings(block):
                terms = (coupling.tensor * coupling.tensor.grad).abs()
                rows = terms if terms.dim() == 1 else terms.sum(1 - coupling.dim)
                expected = expected + rows.reshape(len(scores), -1).sum(1)
            torch.testing.assert_close(scores, expected.detach(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("where", TOWERS)
def test_the_loss_without_a_block_is_that_of_the_model_without_it(source, batches, where):
    model = models.load(source)
    tower = tower_of(model, where)
    found = importance.block_perplexities(tower, batches)
    for missing in range(len(tower.blocks)):
        shorter = copy.deepcopy(model)
        tower_of(shorter, where).keep_blocks([index for index in range(len(tower.blocks)) if index != missing])
        with torch.no_grad():
            assert float(found[missing]) == pytest.approx(float(loss(shorter, batches).exp()), rel=1e-4)


@pytest.mark.parametrize("where", TOWERS)
def test_block_influence_is_the_mean_over_all_states(source, batches, where):
    model = models.load(source)
    tower = tower_of(model, where)
    found = importance.block_distances(tower, batches)
    kept, hooks = [[] for _ in tower.blocks], []
    for index, block in enumerate(tower.blocks):
        hooks.append(
            block.register_forward_hook(
                lambda _, args, out, i=index: kept[i].append(
                    1 - torch.nn.functional.cosine_similarity(args[0].double(), out.double(), dim=-1).flatten()
                )
            )
        )
    with torch.no_grad():
        loss(model, batches)
    for scores, states in zip(found, kept, strict=True):
        assert float(scores) == pytest.approx(float(torch.cat(states).mean()), rel=1e-5)


POINTS = [
    {"method": "width", "ratio": 0.5, "importance": "taylor", "parts": ["mlp"]},
    {"method": "width", "ratio": 0.5, "importance": "activation", "parts": ["mlp", "attention"]},
    {"method": "width", "ratio": 0.5, "importance": "magnitude", "parts": ["attention"], "tower": "vision"},
    {"method": "width", "ratio": 0.4, "importance": "taylor-mixed", "ranking": "global", "tower": "text"},
    {"method": "width", "ratio": 0.5, "importance": "taylor-second", "tower": "vision"},
    {"method": "depth", "ratio": 0.4, "importance": "block-influence"},
    {"method": "depth", "ratio": 0.5, "importance": "taylor", "tower": "vision"},
    {"method": "depth", "ratio": 0.3, "importance": "perplexity", "tower": "text"},
    {"method": "unstructured", "ratio": 0.5, "importance": "wanda"},
    {"method": "unstructured", "ratio": 0.5, "importance": "sparsegpt", "tower": "vision"},
]


@pytest.mark.parametrize(
    "point", POINTS, ids=lambda point: "-".join(str(value) for value in point.values() if not isinstance(value, list))
)
def test_a_pruned_checkpoint_loads_again_with_the_same_outputs(source, batches, tmp_path, point):
    model = models.load(source)
    untouched = {"text", "vision"} - {point.get("tower", "text"), point.get("tower", "vision")}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    facts = prune.prune(model, point, batches).facts
    assert facts["calibration"]["sequences"] == sum(len(batch["keys"]) for batch in batches)
    assert facts["parameters"]["after"] < facts["parameters"]["before"] or point["method"] == "unstructured"
    for name, tensor in model.state_dict().items():
        if any(name.startswith(f"{tower}_model") for tower in untouched):
            assert torch.equal(tensor, before[name])
    models.save(model, source.reader(), tmp_path / "out")
    again = models.load(models.Source(str(tmp_path / "out")))
    torch.testing.assert_close(outputs(again), outputs(model), rtol=1e-5, atol=1e-6)
    odd = pruned_shapes.layers_of(tmp_path / "out", again.config)
    pools = getattr(model.config.vision_config, "vision_use_head", False)
    heads, uneven = "attention" in point.get("parts", ()), point.get("ranking") == "global"
    wide = point["method"] == "width"
    assert bool(odd) == (wide and (heads or uneven or (pools and point.get("tower") != "text")))
    assert (tmp_path / "out" / pruned_shapes.MANIFEST).is_file() == bool(odd)
    if not odd:
        plain = AutoModel.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(outputs(plain), outputs(again), rtol=1e-5, atol=1e-6)
    assert models.parameters(models.skeleton(models.Source(str(tmp_path / "out")))) == facts["parameters"]["after"]


@pytest.mark.parametrize("where", TOWERS)
@pytest.mark.parametrize("part", ["mlp", "attention"])
def test_a_cut_tower_computes_what_the_dense_one_does_with_the_structures_masked(source, where, part):
    model = models.load(source)
    masked = copy.deepcopy(model)
    point = {"method": "width", "ratio": 0.5, "importance": "magnitude", "parts": [part], "tower": where}
    removed = prune.prune(model, point, []).facts["removed"][part]
    tower = tower_of(masked, where)
    with torch.no_grad():
        for block, gone in zip(tower.blocks, removed, strict=True):
            *_, (owner, name, dim, width, _) = tower.parts[part].couplings(block)
            for structure in gone:
                getattr(owner, name)[:, structure * width : (structure + 1) * width] = 0
                assert dim == 1
    torch.testing.assert_close(outputs(model), outputs(masked), rtol=1e-4, atol=1e-5)


def test_the_widths_of_blocks_are_found_without_the_manifest_and_compared_with_one_that_is_there(source, tmp_path):
    model, out = models.load(source), tmp_path / "out"
    prune.prune(model, {"method": "width", "ratio": 0.5, "parts": ["attention"], "importance": "magnitude"}, [])
    models.save(model, source.reader(), out)
    manifest = (out / pruned_shapes.MANIFEST).read_text()
    (out / pruned_shapes.MANIFEST).unlink()
    torch.testing.assert_close(outputs(models.load(models.Source(str(out)))), outputs(model), rtol=1e-5, atol=1e-6)
    (out / pruned_shapes.MANIFEST).write_text(manifest.replace('"num_attention_heads": 2', '"num_attention_heads": 3'))
    with pytest.raises(CheckpointError, match=r"has .*3.* in this file but .*2.* in the weights"):
        models.load(models.Source(str(out)))


def test_names_a_tower_that_there_is_not(source):
    with pytest.raises(SettingsError, match=r"'tower' is 'encoder', but must be one of \['text', 'vision'\]"):
        prune.towers_of({"method": "depth", "ratio": 0.5, "tower": "encoder"}, models.load(source).config)


def test_calibration_batches_hold_pairs_of_one_length_and_none_alone():
    rows = [
        {"input_ids": [0] * n, "keys": (n, n), "pixels": lambda: torch.zeros(1, 3, 2, 2)} for n in (3, 3, 4, 5, 5, 5)
    ]
    found = KIND.calibration(rows)
    assert [tuple(batch["input_ids"].shape) for batch in found] == [(2, 3), (3, 5)]
