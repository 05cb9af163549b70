"""Multiply-accumulates and parameters, against torch's own count of what runs and against formulas."""

import functools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from coppice.models import footprint
from coppice.report.study_report import sections
from tests.unit import tiny_architectures

ARCHITECTURES = (
    *(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "phi3",
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "olmoe",
        "granitemoe",
    ),
    *("phimoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "phi"),
)
WITHOUT_KNOWN_ATTENTION = {"gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "phi"}


@functools.cache
def build(name, **changes):
    """Build a tiny model whose experts and attention run as matrix products that torch can count."""
    model = tiny_architectures.build(name, attn_implementation="eager", **changes)
    model.config._experts_implementation = "eager"  # the fused products of experts are not counted
    return model


def flops_as_macs(model, tokens):
    """Return half the FLOPs of `tokens` tokens, as torch counts them: (all, those of batched products)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(1, tokens + 1)[None], use_cache=False)
    counted = {str(operator): count // 2 for operator, count in counter.get_flop_counts()["Global"].items()}
    return sum(counted.values()), sum(count for operator, count in counted.items() if "bmm" in operator)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_macs_are_half_the_flops_of_a_forward_pass(name):
    model, tokens = build(name), 8
    every, attention = flops_as_macs(model, tokens)
    found = footprint.measure(model, tokens)
    assert found["linear_macs"] == (every - attention) / tokens
    expected = None if name in WITHOUT_KNOWN_ATTENTION else attention / tokens
    assert found["attention_macs"] == expected


def test_a_model_with_a_state_is_counted_or_unknown():
    model = tiny_architectures.build("rwkv")
    found = footprint.measure(model)
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert found["linear_macs"] == sum(module.weight.numel() for module in linear) and found["attention_macs"] is None
    for name in ("mamba", "jamba"):  # their kernels use the weights without calling the layers
        found = footprint.measure(tiny_architectures.build(name))
        assert found["linear_macs"] is None and found["attention_macs"] is None


@pytest.mark.parametrize(
    ("name", "layers_with_experts", "width", "biases"),
    [
        ("mixtral", 2, 48, 0),
        ("qwen2_moe", 2, 16, 0),
        ("qwen3_moe", 2, 16, 0),
        ("deepseek_v3", 1, 16, 0),  # its first layer has a usual MLP
        ("gpt_oss", 2, 48, 2 * 48 + 32),
    ],
)
def test_active_parameters_leave_out_the_experts_that_a_token_does_not_visit(name, layers_with_experts, width, biases):
    model = build(name)
    found = footprint.measure(model)
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    idle = (4 - 2) * layers_with_experts * (3 * 32 * width + biases)  # 2 of 4 experts, each of three matrices
    assert found["active_parameters"] == found["parameters"] - idle


def test_without_experts_all_parameters_are_active():
    found = footprint.measure(build("gpt2"))
    assert found["active_parameters"] == found["parameters"]


@pytest.mark.parametrize("changes", [{}, {"num_experts_per_tok": 1}])
def test_mixtral_matches_its_formula(changes):
    model = build("mixtral", **changes)
    visited = changes.get("num_experts_per_tok", 2)
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 4 * 32 + visited * 3 * 32 * 48
    assert footprint.measure(model)["linear_macs"] == 2 * layer + 128 * 32


class Twice(torch.nn.Module):
    """Run a layer twice."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, states):
        return self.layer(self.layer(states))


class Bypassed(torch.nn.Module):
    """Use the weights of a layer without calling it, as a fused kernel does."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, states):
        return torch.nn.functional.linear(states, self.layer.weight)


class OwnMatrix(torch.nn.Module):
    """Multiply by a matrix that belongs to no layer."""

    def __init__(self, layer):
        super().__init__()
        self.matrix = torch.nn.Parameter(layer.weight.detach().clone())

    def forward(self, states):
        return states @ self.matrix.T


@pytest.mark.parametrize(("wrapper", "added"), [(Twice, 32 * 32), (Bypassed, None), (OwnMatrix, None)])
def test_counts_what_runs_or_says_that_it_is_unknown(wrapper, added):
    model = tiny_architectures.build.__wrapped__("llama")
    before = footprint.measure(model)["linear_macs"]
    attention = model.model.layers[0].self_attn
    attention.o_proj = wrapper(attention.o_proj)
    ran = footprint._observed(model)
    assert footprint._linear_macs(model, ran) == (None if added is None else before + added)


def test_a_part_that_no_text_reaches_costs_nothing():
    model = tiny_architectures.build.__wrapped__("llama")
    before = footprint.measure(model)["linear_macs"]
    model.vision_tower = torch.nn.Sequential(torch.nn.Linear(32, 32))
    assert footprint.measure(model)["linear_macs"] == before


def test_experts_that_choose_their_rows_themselves_are_unknown():
    found = footprint.measure(tiny_architectures.build("llama4"))
    assert found["linear_macs"] is None and found["active_parameters"] is None


def test_sparse_and_state_space_attention_are_unknown():
    assert footprint.measure(tiny_architectures.build("deepseek_v32"))["attention_macs"] is None
    assert footprint.measure(tiny_architectures.build("jamba"))["attention_macs"] is None


def test_a_window_limits_the_keys():
    model = tiny_architectures.build("mistral-window")
    found = [footprint.measure(model, length)["attention_macs"] for length in (16, 32, 64)]
    assert found == [2 * 2 * 32 * keys for keys in (16, 32, 32)]


@pytest.mark.parametrize("linear", [None, 12345])
def test_the_report_says_unknown_and_shows_active_parameters(linear):
    cost = {
        "parameters": 5000,
        "active_parameters": 3000,
        "nonzero_parameters": None,
        "macs_per_token": {"linear": linear},
        "weight_bytes": 2**20,
    }
    shown = sections._measured(cost)
    assert shown.startswith("5,000 parameters, unknown nonzero, 3,000 used by one token; ")
    assert f"{'unknown' if linear is None else '12,345'} MACs per token" in shown
    assert math.isclose(float(shown.split("; ")[-1].split()[0]), 1.0)
