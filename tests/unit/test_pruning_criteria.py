"""Criteria of depth and width compared with their formulas by plain autograd; protected blocks; pruning in steps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_settings import load, message

from coppice import models
from coppice.core.errors import SettingsError
from coppice.models import kinds
from coppice.stages.prune import importance, prune, resolve

each_architecture = pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])


def tower_of(model):
    return kinds.of(model.config).towers(model)[0]


def mean_loss(model, batches):
    outputs = torch.cat([model(input_ids=batch).logits[:, :-1].flatten(0, 1) for batch in batches])
    return F.cross_entropy(outputs, torch.cat([batch[:, 1:].flatten() for batch in batches]))


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def unequal(token_batches):
    return [*token_batches(count=2), *token_batches(count=1, rows=1, length=9, seed=5)]


@each_architecture
def test_perplexity_of_a_block_is_that_of_the_text_without_it(tiny_model, token_batches, architecture):
    model, batches = tiny_model(architecture), unequal(token_batches)
    scores = importance.block_perplexities(tower_of(model), batches)
    for index in range(4):
        skipping = copy.deepcopy(model)
        skipping.model.layers[index].forward = lambda hidden_states, **_: hidden_states
        with torch.no_grad():
            expected = mean_loss(skipping, batches).exp()
        torch.testing.assert_close(scores[index].float(), expected, rtol=1e-4, atol=0)


@each_architecture
def test_taylor_of_a_block_sums_over_all_its_weights(tiny_model, token_batches, architecture):
    model, batches = tiny_model(architecture).double(), unequal(token_batches)
    scores = importance.block_taylor(tower_of(model), batches)
    mean_loss(model, batches).backward()
    for index, layer in enumerate(model.model.layers):
        weights = [p for name, p in layer.named_parameters() if name.endswith("weight")]
        expected = sum((p * p.grad).abs().sum().item() for p in weights)
        assert scores[index].item() == pytest.approx(expected, rel=1e-5)


@each_architecture
@pytest.mark.parametrize("form", ["taylor-second", "taylor-mixed"])
def test_second_order_and_mixed_taylor_equal_the_formula(tiny_model, token_batches, architecture, form):
    model, batches = tiny_model(architecture).double(), unequal(token_batches)
    scores = importance.taylor(tower_of(model), ["mlp"], batches, form)
    rows = [row[None] for batch in batches for row in batch]
    projections = {
        (index, name): layer.mlp.get_submodule(name).weight
        for index, layer in enumerate(model.model.layers)
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    hessian = dict.fromkeys(projections, 0)
    for row in rows:  # the mean of the squared gradients of each example's own loss
        model.zero_grad()
        mean_loss(model, [row]).backward()
        hessian = {place: total + projections[place].grad.square() / len(rows) for place, total in hessian.items()}
    model.zero_grad()
    mean_loss(model, batches).backward()
    for index in range(4):
        expected = 0
        for name, dim in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 0)):
            weight = projections[index, name]
            second = weight * hessian[index, name] * weight
            salience = second if form == "taylor-second" else weight * weight.grad - 0.5 * second
            expected = expected + salience.abs().sum(dim)
        torch.testing.assert_close(scores["mlp"][index], expected.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["block-influence", "perplexity", "taylor"])
def test_depth_removes_the_blocks_of_lowest_importance_that_are_not_kept(tiny_model, token_batches, name):
    measures = {
        "block-influence": importance.block_distances,
        "perplexity": importance.block_perplexities,
        "taylor": importance.block_taylor,
    }
    dense = tiny_model("llama", num_hidden_layers=6)
    scores = measures[name](tower_of(dense), token_batches()).tolist()
    point = {"method": "depth", "ratio": 1 / 3, "importance": name}
    for keep in ({}, {"first": 1}, {"last": 2}, {"first": 2, "last": 1}):
        free = range(keep.get("first", 0), 6 - keep.get("last", 0))
        expected = sorted(sorted(free, key=lambda i: scores[i])[:2])
        facts = prune(copy.deepcopy(dense), point | ({"keep_blocks": keep} if keep else {}), token_batches()).facts
        assert facts["removed"] == {"layers": expected}
        assert list(facts["importance"].values()) == [pytest.approx(scores)]


def test_a_consecutive_run_lies_between_the_kept_blocks(tiny_model, token_batches):
    point = {"method": "depth", "ratio": 0.5, "consecutive": True, "keep_blocks": {"first": 2, "last": 1}}
    facts = prune(tiny_model("llama", num_hidden_layers=6), point, token_batches()).facts
    assert facts["removed"] == {"layers": [2, 3, 4]}


@pytest.mark.parametrize("name", ["block-influence", "perplexity", "taylor"])
def test_depth_in_steps_measures_again_after_each_block(tiny_model, token_batches, name):
    dense, left = tiny_model("qwen3", num_hidden_layers=6), list(range(6))
    one_by_one = copy.deepcopy(dense)
    for _ in range(3):
        point = {"method": "depth", "ratio": 1 / len(left), "importance": name}
        result = prune(one_by_one, point, token_batches())
        del left[result.facts["removed"]["layers"][0]]
    point = {"method": "depth", "ratio": 0.5, "importance": name, "steps": 3}
    result = prune(dense, point, token_batches())
    assert result.facts["removed"]["layers"] == [index for index in range(6) if index not in left]
    assert torch.equal(logits(result.model, token_batches()[0]), logits(one_by_one, token_batches()[0]))


@pytest.mark.parametrize("name", ["taylor", "taylor-mixed", "activation", "magnitude"])
def test_width_in_steps_measures_again_after_each_step(tiny_model, token_batches, name):
    dense, ids = tiny_model("llama"), token_batches()[0]
    twice, zeroed = copy.deepcopy(dense), copy.deepcopy(dense)
    point = {"method": "width", "importance": name, "parts": ["mlp"]}
    prune(twice, point | {"ratio": 0.25}, token_batches())  # 48 channels to 36
    prune(twice, point | {"ratio": 1 / 3}, token_batches())  # and to 24
    result = prune(dense, point | {"ratio": 0.5, "steps": 2}, token_batches())
    assert torch.equal(logits(result.model, ids), logits(twice, ids))
    for layer, channels in zip(zeroed.model.layers, result.facts["removed"]["mlp"], strict=True):
        assert len(channels) == 24  # in the numbering of the dense model
        layer.mlp.down_proj.weight.data[:, channels] = 0
    torch.testing.assert_close(logits(result.model, ids), logits(zeroed, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ranking", ["uniform", "global"])
@pytest.mark.parametrize("steps", [1, 3])
def test_width_leaves_kept_blocks_whole_and_the_checkpoint_loads(
    tiny_model, token_batches, tiny_tokenizer, tmp_path, ranking, steps
):
    point = {"method": "width", "ratio": 0.5, "parts": ["mlp", "attention"], "ranking": ranking}
    point |= {"keep_blocks": {"first": 1, "last": 1}, "steps": steps}
    result = prune(tiny_model("llama"), point, token_batches())
    shapes = [tuple(shape.values()) for shape in result.facts["per_layer_shapes"].values()]
    assert shapes[0] == shapes[3] == (48, 8, 4)
    assert sum(shape[0] for shape in shapes[1:3]) == 48 and sum(shape[2] for shape in shapes[1:3]) == 4
    if ranking == "uniform":
        assert shapes[1] == shapes[2] == (24, 4, 2)
    assert [len(layer) for layer in result.facts["removed"]["mlp"]] == [48 - shape[0] for shape in shapes]
    models.save(result.model, models.Reader(tiny_tokenizer), tmp_path)
    loaded = models.load(models.Source(str(tmp_path)))
    assert torch.equal(logits(loaded, token_batches()[0]), logits(result.model, token_batches()[0]))


def test_steps_end_with_widths_that_gpus_like(tiny_model, token_batches):
    wide = {"intermediate_size": 1032, "num_hidden_layers": 3}
    point = {"method": "width", "ratio": 0.1, "importance": "magnitude", "parts": ["mlp"], "steps": 3}
    for ranking in ("uniform", "global"):
        facts = prune(tiny_model("llama", **wide), point | {"ranking": ranking}, token_batches()).facts
        widths = [shape["intermediate_size"] for shape in facts["per_layer_shapes"].values()]
        assert all(width % 8 == 0 for width in widths) and abs(sum(widths) - 3 * 929) <= 12


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ({"method": "depth", "ratio": 0.5, "importance": "perplexty"}, "did you mean 'perplexity'"),
        ({"method": "depth", "ratio": 0.5, "keep_blocks": {"first": 2, "last": 1}}, "and 1 are free"),
        ({"method": "depth", "ratio": 0.5, "keep_blocks": {"first": 4}}, "keeps all 4 layers"),
        ({"method": "depth", "ratio": 0.5, "keep_blocks": {"frist": 1}}, "a mapping such as"),
        ({"method": "width", "ratio": 0.5, "keep_blocks": {"first": -1}}, "at least 0"),
        ({"method": "depth", "ratio": 0.5, "consecutive": True, "steps": 2}, "Remove one of them"),
        ({"method": "depth", "ratio": 0.5, "consecutive": True, "importance": "taylor"}, "Remove one of them"),
        ({"method": "width", "ratio": 0.5, "steps": 0}, "at least 1"),
        ({"method": "unstructured", "ratio": 0.5, "steps": 2}, "'steps' is not a key of method 'unstructured'"),
    ],
)
def test_rejects_a_point_with_a_remedy(tiny_model, point, words):
    with pytest.raises(SettingsError, match=words):
        resolve(point, tiny_model("llama").config)


def test_names_of_candidates_say_what_is_not_the_default():
    points = [
        {"method": "depth", "ratio": 0.25},
        {"method": "depth", "ratio": 0.25, "importance": "taylor", "keep_blocks": {"first": 4, "last": 2}},
        {"method": "width", "ratio": 0.5, "importance": "taylor-mixed", "steps": 4},
        {"method": "unstructured", "ratio": 0.25, "importance": "sparsegpt", "pattern": "3:4"},
    ]
    candidates = load({"candidates": {"prune": points}}).candidates("Llama")
    assert list(candidates) == [
        "depth-0.25",
        "depth-0.25-taylor-keep-4-2",
        "width-0.5-taylor-mixed-steps-4",
        "unstructured-0.25-sparsegpt-3-4",
    ]
    wrong = {"method": "unstructured", "ratio": 0.5, "pattern": "3:4"}
    assert "the pattern 3:4 needs 0.25" in message({"candidates": {"prune": [wrong]}})
