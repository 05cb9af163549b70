"""Wanda, SparseGPT and magnitude compared with the published formulas, written out here on plain tensors."""

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from coppice import models
from coppice.core.errors import CheckpointError
from coppice.models import kinds
from coppice.stages.prune import blockwise, layer_inputs, prune, sparsegpt, unstructured

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral"]
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
each_pattern = pytest.mark.parametrize("pattern", [None, "2:4", "4:8", "3:4"])


def point(importance, pattern=None, ratio=0.5):
    if pattern:
        kept, of = map(int, pattern.split(":"))
        ratio = 1 - kept / of
    return {"method": "unstructured", "ratio": ratio, "importance": importance, "pattern": pattern}


def linear_layers(block):
    return {name: module for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}


def zeros_of(model):
    return {
        (index, name): linear.weight == 0
        for index, block in enumerate(model.model.layers)
        for name, linear in linear_layers(block).items()
    }


def lowest(scores, ratio, pattern):
    """Return the weights to zero, row by row and group by group, in plain Python."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for row, values in enumerate(scores.tolist()):
        groups = [range(len(values))]
        count = int(len(values) * ratio)
        if pattern:
            kept, of = map(int, pattern.split(":"))
            groups, count = [range(start, start + of) for start in range(0, len(values), of)], of - kept
        for group in groups:
            for place in sorted(group, key=lambda i: (values[i], i))[:count]:
                mask[row, place] = True
    return mask


@torch.no_grad()
def by_blocks(model, batches, prune_layer):
    """Prune a model as the references do: catch all inputs of a block by running the whole model, then prune it.

    This runs the model from its first block for each block, so it shares no code with the walk that is tested.
    """
    for block in model.model.layers:
        layers = linear_layers(block)
        inputs = {name: [] for name in layers}
        hooks = [
            linear.register_forward_pre_hook(lambda m, a, found=inputs[name]: found.append(a[0].flatten(0, 1)))
            for name, linear in layers.items()
        ]
        for batch in batches:
            model(input_ids=batch, use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, linear in layers.items():
            prune_layer(linear, torch.cat(inputs[name]).double())
    return model


def reference_wanda(model, batches, ratio, pattern):
    def prune_layer(linear, inputs):
        scores = linear.weight.double().abs() * inputs.norm(dim=0)
        linear.weight[lowest(scores, ratio, pattern)] = 0

    return by_blocks(model, batches, prune_layer)


def reference_sparsegpt(weight, inputs, ratio, pattern, columns=128):
    """Return Algorithm 1 of Frantar & Alistarh 2023, in float64, one weight of a row after another.

    The inverse of the Hessian of the columns that are left is computed afresh by elimination instead of a Cholesky
    factor, and each column's error goes to all later columns at once instead of block by block.
    """
    weight, hessian = weight.double().clone(), inputs.T @ inputs
    dead = hessian.diagonal() == 0
    weight[:, dead] = 0
    hessian[dead, dead] = 1
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    # the inverse of what is left after columns 0..j-1 are gone, for each j
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(len(hessian))]
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    kept, of = map(int, pattern.split(":")) if pattern else (0, 1)
    for j in range(weight.shape[1]):
        if not pattern and j % columns == 0:
            part = slice(j, min(j + columns, weight.shape[1]))
            scale = torch.tensor([inverses[i][0, 0] for i in range(part.start, part.stop)], dtype=torch.float64)
            scores = weight[:, part].square() / scale
            ordered = sorted(scores.flatten().tolist())
            mask[:, part] = scores <= ordered[int(len(ordered) * ratio)]
        if pattern and j % of == 0:
            scale = torch.tensor([inverses[i][0, 0] for i in range(j, j + of)], dtype=torch.float64)
            mask[:, j : j + of] = lowest(weight[:, j : j + of].square() / scale, 0, f"{kept}:{of}")
        removed = torch.where(mask[:, j], weight[:, j], 0)
        weight[:, j:] -= removed[:, None] * inverses[j][0] / inverses[j][0, 0]
        weight[mask[:, j], j] = 0
    return weight


@each_architecture
@each_pattern
def test_wanda_zeroes_the_weights_that_the_reference_zeroes(tiny_model, token_batches, architecture, pattern):
    dense, batches, chosen = tiny_model(architecture), token_batches(), point("wanda", pattern, 0.3)
    expected = zeros_of(reference_wanda(copy.deepcopy(dense), batches, chosen["ratio"], pattern))
    found = zeros_of(prune(dense, chosen, batches).model)
    for place, zeros in expected.items():
        assert torch.equal(found[place], zeros), place


def test_wanda_measures_later_blocks_behind_pruned_ones_and_the_one_shot_form_does_not(tiny_model, token_batches):
    batches = token_batches()
    walked, at_once = (
        zeros_of(prune(tiny_model("llama"), point(name), batches).model) for name in ("wanda", "wanda-one-shot")
    )
    first = {place: zeros for place, zeros in walked.items() if place[0] == 0}
    assert all(torch.equal(zeros, at_once[place]) for place, zeros in first.items())
    assert not all(torch.equal(zeros, at_once[place]) for place, zeros in walked.items())

    dense = tiny_model("llama")
    tower = kinds.of(dense.config).towers(dense)[0]
    linears = [linear for block in tower.blocks for linear in unstructured.linears_of(block)]
    with torch.no_grad():
        sums = layer_inputs.square_sums(linears, [lambda b=batch: tower.run(b) for batch in batches])
    for (index, name), zeros in at_once.items():
        linear = dense.model.layers[index].get_submodule(name)
        assert torch.equal(zeros, lowest(linear.weight.detach().abs() * sums[linear].sqrt().float(), 0.5, None))


def test_layers_with_a_sliding_window_are_measured_with_their_own_mask(tiny_model, token_batches):
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    dense, batches = tiny_model("qwen3", **window), token_batches(length=24)
    assert len(set(dense.config.layer_types)) == 2
    expected = zeros_of(reference_wanda(copy.deepcopy(dense), batches, 0.5, None))
    found = zeros_of(prune(dense, point("wanda"), batches).model)
    assert all(torch.equal(found[place], zeros) for place, zeros in expected.items())


@pytest.mark.parametrize("name", ["wanda", "wanda-one-shot", "sparsegpt", "magnitude"])
@each_pattern
def test_a_pattern_keeps_n_of_every_m_weights(tiny_model, token_batches, name, pattern):
    result = prune(tiny_model("mistral"), point(name, pattern), token_batches())
    for zeros in zeros_of(result.model).values():
        if pattern:
            kept, of = map(int, pattern.split(":"))
            assert (zeros.view(len(zeros), -1, of).sum(-1) == of - kept).all()
        else:
            assert abs(zeros.float().mean() - 0.5) < 0.01
    assert result.facts["parameters"]["before"] == result.facts["parameters"]["after"]


@each_pattern
@pytest.mark.parametrize("columns", [96, 160])
def test_sparsegpt_of_a_layer_equals_the_algorithm_in_float64(pattern, columns):
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(2 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    inputs[:, 5] = 0  # a dead column
    weight = torch.randn(24, columns, generator=generator)
    ratio = point("sparsegpt", pattern)["ratio"]
    expected = reference_sparsegpt(weight, inputs.double(), ratio, pattern)
    dead, factor = sparsegpt.inverse_factor(inputs.T @ inputs)
    found = sparsegpt.pruned(weight, dead, factor, ratio, pattern).double()
    assert dead.nonzero().tolist() == [[5]]
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("pattern", ["3:5", "5:7", "75:150"])
def test_sparsegpt_takes_groups_that_do_not_divide_its_block_of_columns(pattern):
    _, of = map(int, pattern.split(":"))
    generator = torch.Generator().manual_seed(of)
    inputs, weight = (torch.randn(rows, 2 * of, generator=generator) for rows in (500, 8))
    expected = reference_sparsegpt(weight, inputs.double(), 0, pattern)
    found = sparsegpt.pruned(weight, *sparsegpt.inverse_factor(inputs.T @ inputs), 0, pattern).double()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@each_architecture
def test_sparsegpt_goes_block_by_block_through_the_whole_model(tiny_model, token_batches, architecture):
    dense, batches = tiny_model(architecture).double(), token_batches(rows=8)

    def prune_layer(linear, inputs):
        linear.weight.copy_(reference_sparsegpt(linear.weight, inputs, 0.5, "2:4"))

    expected = by_blocks(copy.deepcopy(dense), batches, prune_layer)
    found = prune(dense, point("sparsegpt", "2:4"), batches).model
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_sparsegpt_changes_the_outputs_less_than_wanda(tiny_model, token_batches):
    dense, batches = tiny_model("llama"), token_batches(rows=16, length=32)

    @torch.no_grad()
    def error(importance):
        pruned = prune(copy.deepcopy(dense), point(importance, "2:4"), batches).model
        return math.fsum((pruned(b).logits - dense(b).logits).square().mean().item() for b in batches)

    assert error("sparsegpt") < error("wanda")


def test_a_walk_leaves_no_hook_or_changed_forward_behind(tiny_model, token_batches):
    model = tiny_model("llama")
    tower = kinds.of(model.config).towers(model)[0]
    runs = []

    def visit(index, passes):
        for run in passes:
            run()
        runs.append((index, len(passes)))

    with blockwise.calibrating(model):
        blockwise.visit_forwards(tower, token_batches(), visit)
    assert runs == [(index, 3) for index in range(4)]
    assert not any("forward" in block.__dict__ for block in model.model.layers)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["wanda", "wanda-one-shot", "sparsegpt", "magnitude"])
def test_rejects_damaged_weights(tiny_model, token_batches, name):
    broken = tiny_model("llama")
    broken.model.layers[3].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="layer 3"):
        prune(broken, point(name), token_batches())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "magnitude"])
def test_half_precision_models_keep_their_dtype(tiny_model, token_batches, tiny_tokenizer, tmp_path, dtype, name):
    result = prune(tiny_model("qwen3").to(dtype), point(name, "2:4"), token_batches())
    models.save(result.model, models.Reader(tiny_tokenizer), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert torch.isfinite(loaded(token_batches()[0]).logits).all()
