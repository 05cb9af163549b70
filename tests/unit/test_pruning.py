"""Pruned models compared with independent references: the dense model with the same structures zeroed or skipped."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from coppice import models
from coppice.core.errors import CheckpointError, DataError, SettingsError
from coppice.models import kinds, pruned_shapes
from coppice.stages.prune import check_grid, importance, prune, resolve

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral"]
POINTS = {
    "depth": {"method": "depth", "ratio": 0.5},
    "depth-consecutive": {"method": "depth", "ratio": 0.5, "consecutive": True},
    "mlp-taylor": {"method": "width", "ratio": 0.5, "importance": "taylor", "parts": ["mlp"]},
    "both-taylor": {"method": "width", "ratio": 0.5, "importance": "taylor", "parts": ["mlp", "attention"]},
    "both-magnitude": {"method": "width", "ratio": 0.5, "importance": "magnitude", "parts": ["mlp", "attention"]},
}
# The number of heads no longer divides hidden_size; every architecture but Llama loads such a configuration.
THREE_GROUPS = {"method": "width", "ratio": 0.25, "parts": ["attention"]}


def cases():
    yield from ((architecture, point) for architecture in ARCHITECTURES for point in POINTS.values())
    yield from ((architecture, THREE_GROUPS) for architecture in ARCHITECTURES if architecture != "llama")


def case_id(value):
    return value if isinstance(value, str) else "-".join(str(v) for v in value.values())


each_case = pytest.mark.parametrize(("architecture", "point"), list(cases()), ids=case_id)
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def tower_of(model):
    """Return the decoder of a model."""
    return kinds.of(model.config).towers(model)[0]


def damped(model, *blocks):
    """Return the model with these blocks made nearly the identity, so that depth pruning must pick them."""
    for index in blocks:
        model.model.layers[index].mlp.down_proj.weight.data *= 1e-2
        model.model.layers[index].self_attn.o_proj.weight.data *= 1e-2
    return model


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@each_case
def test_a_pruned_model_saved_and_reloaded_by_plain_transformers_gives_identical_logits(
    tiny_model, token_batches, tmp_path, architecture, point
):
    dense, (ids, *_) = tiny_model(architecture), token_batches()
    before = logits(dense, ids)
    pruned = prune(dense, point, token_batches()).model
    pruned.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(loaded, ids), logits(pruned, ids))
    assert not torch.allclose(logits(loaded, ids), before, atol=0.1)


@each_case
def test_generation_with_the_kv_cache_equals_greedy_decoding_without_it(tiny_model, token_batches, architecture, point):
    result = prune(damped(tiny_model(architecture), 1, 2), point, token_batches())  # the first and last block stay
    assert point["method"] != "depth" or result.facts["removed"] == {"layers": [1, 2]}
    pruned = result.model
    assert [layer.self_attn.layer_idx for layer in pruned.model.layers] == list(range(pruned.config.num_hidden_layers))
    prompt = token_batches(count=1, rows=2, length=5, seed=7)[0]
    ids = prompt
    for _ in range(12):
        ids = torch.cat([ids, logits(pruned, ids)[:, -1:].argmax(-1)], dim=1)
    cached = pruned.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, use_cache=True)
    assert torch.equal(cached, ids)


@each_architecture
@pytest.mark.parametrize("kind", ["taylor", "magnitude"])
def test_removing_channels_equals_zeroing_their_columns_of_down_proj(tiny_model, token_batches, architecture, kind):
    dense, (ids, *_) = tiny_model(architecture), token_batches()
    zeroed = copy.deepcopy(dense)
    result = prune(dense, {"method": "width", "ratio": 0.25, "importance": kind, "parts": ["mlp"]}, token_batches())
    for layer, channels in zip(zeroed.model.layers, result.facts["removed"]["mlp"], strict=True):
        assert len(channels) == 12
        layer.mlp.down_proj.weight.data[:, channels] = 0
    torch.testing.assert_close(logits(result.model, ids), logits(zeroed, ids), atol=1e-5, rtol=1e-5)


@each_architecture
def test_removing_kv_groups_equals_zeroing_their_heads_columns_of_o_proj(tiny_model, token_batches, architecture):
    dense, (ids, *_) = tiny_model(architecture), token_batches()
    zeroed = copy.deepcopy(dense)
    result = prune(dense, {"method": "width", "ratio": 0.5, "parts": ["attention"]}, token_batches())
    for layer, groups in zip(zeroed.model.layers, result.facts["removed"]["attention"], strict=True):
        assert len(groups) == 2
        for head in range(8):
            if head // 2 in groups:  # two query heads a KV head
                layer.self_attn.o_proj.weight.data[:, head * 4 : head * 4 + 4] = 0
    torch.testing.assert_close(logits(result.model, ids), logits(zeroed, ids), atol=1e-5, rtol=1e-5)


def test_biases_are_pruned_with_their_rows(tiny_model, token_batches):
    dense, (ids, *_) = tiny_model("llama", attention_bias=True, mlp_bias=True), token_batches()
    zeroed = copy.deepcopy(dense)
    point = {"method": "width", "ratio": 0.5, "importance": "magnitude", "parts": ["mlp", "attention"]}
    result = prune(dense, point, [])
    for layer, channels, groups in zip(zeroed.model.layers, *result.facts["removed"].values(), strict=True):
        layer.mlp.down_proj.weight.data[:, channels] = 0
        layer.self_attn.o_proj.weight.data.view(32, 4, 8)[:, groups] = 0
    torch.testing.assert_close(logits(result.model, ids), logits(zeroed, ids), atol=1e-5, rtol=1e-5)


@each_architecture
def test_removing_blocks_equals_skipping_them(tiny_model, token_batches, architecture):
    dense, (ids, *_) = tiny_model(architecture), token_batches()
    skipping = copy.deepcopy(dense)
    result = prune(dense, POINTS["depth"], token_batches())
    assert len(result.facts["removed"]["layers"]) == 2
    for index in result.facts["removed"]["layers"]:
        skipping.model.layers[index].forward = lambda hidden_states, **_: hidden_states
    torch.testing.assert_close(logits(result.model, ids), logits(skipping, ids), atol=1e-6, rtol=0)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_layers_keep_their_kind_of_attention_when_others_are_removed(tiny_model, token_batches, tmp_path, architecture):
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "num_hidden_layers": 5}
    dense, ids = damped(tiny_model(architecture, **window), 0, 3), token_batches(length=24)[0]
    assert dense.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 3
    skipping = copy.deepcopy(dense)
    result = prune(dense, {"method": "depth", "ratio": 0.4}, token_batches())
    assert result.facts["removed"] == {"layers": [0, 3]}
    for index in (0, 3):
        skipping.model.layers[index].forward = lambda hidden_states, **_: hidden_states
    result.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    torch.testing.assert_close(logits(loaded, ids), logits(skipping, ids), atol=1e-6, rtol=0)


def test_tied_embeddings_stay_tied(tiny_model, token_batches, tmp_path):
    for point in (POINTS["depth"], POINTS["both-taylor"]):
        result = prune(tiny_model("qwen3", tie_word_embeddings=True), point, token_batches())
        result.model.save_pretrained(tmp_path / point["method"])
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / point["method"])
        for model in (result.model, loaded):
            assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(logits(loaded, token_batches()[0]), logits(result.model, token_batches()[0]))


@each_architecture
def test_taylor_scores_equal_float64_autograd(tiny_model, token_batches, architecture):
    model = tiny_model(architecture).double()
    batches = [*token_batches(count=2), *token_batches(count=1, rows=1, length=9, seed=5)]  # of unequal sizes
    scores = importance.taylor(tower_of(model), ["mlp", "attention"], batches)
    assert all(parameter.grad is None for parameter in model.parameters())

    targets = torch.cat([batch[:, 1:].flatten() for batch in batches])
    outputs = torch.cat([model(input_ids=batch).logits[:, :-1].flatten(0, 1) for batch in batches])
    F.cross_entropy(outputs, targets).backward()
    for index, layer in enumerate(model.model.layers):
        product = {name: (p * p.grad).abs().detach() for name, p in layer.named_parameters()}
        mlp = [
            sum(product[f"mlp.{name}.weight"][c].sum() for name in ("gate_proj", "up_proj"))
            + product["mlp.down_proj.weight"][:, c].sum()
            for c in range(48)
        ]
        groups = []
        for g in range(4):
            total = product["self_attn.o_proj.weight"][:, 8 * g : 8 * g + 8].sum()
            for name, width in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4)):
                for kind in ("weight", "bias"):
                    if f"self_attn.{name}.{kind}" in product:
                        total = total + product[f"self_attn.{name}.{kind}"][width * g : width * (g + 1)].sum()
            groups.append(total)
        # The agreement is no closer because transformers' loss casts the logits to float32.
        torch.testing.assert_close(scores["mlp"][index], torch.stack(mlp), atol=0, rtol=1e-5)
        torch.testing.assert_close(scores["attention"][index], torch.stack(groups), atol=0, rtol=1e-5)


def test_taylor_does_not_depend_on_how_the_calibration_rows_are_batched(tiny_model, token_batches):
    model, batches = tiny_model("llama").double(), token_batches()
    whole = importance.taylor(tower_of(model), ["mlp"], [torch.cat(batches)])
    for one, other in zip(whole["mlp"], importance.taylor(tower_of(model), ["mlp"], batches)["mlp"], strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=1e-5)


def test_the_memory_of_taylor_beyond_the_weights_does_not_grow_with_depth(tiny_model, token_batches):
    """Counts gradients and the activations that autograd keeps, which are those of one block at a time."""

    def peak(layers):
        model, held, top = tiny_model("llama", num_hidden_layers=layers), [0], [0]
        parameters = {p.data_ptr() for p in model.parameters()}

        class Kept:
            def __init__(self, tensor):
                self.tensor, self.size = tensor, 0 if tensor.data_ptr() in parameters else tensor.nbytes
                held[0] += self.size
                top[0] = max(top[0], held[0] + sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

            def __del__(self):
                held[0] -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            importance.taylor(tower_of(model), ["mlp", "attention"], token_batches())
        return top[0]

    assert peak(2) == peak(8) > 0


@each_architecture
def test_activation_scores_are_weights_times_input_norms(tiny_model, token_batches, architecture):
    model, batches = tiny_model(architecture), token_batches()
    scores = importance.activation(tower_of(model), ["mlp", "attention"], batches)
    inputs = {}
    for name, module in model.named_modules():
        if name.endswith(("down_proj", "o_proj")):
            module.register_forward_pre_hook(lambda m, a, n=name: inputs.setdefault(n, []).append(a[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch)
    for index, layer in enumerate(model.model.layers):
        for part, linear, name, width in (
            ("mlp", layer.mlp.down_proj, "mlp.down_proj", 1),
            ("attention", layer.self_attn.o_proj, "self_attn.o_proj", 8),
        ):
            norms = torch.cat(inputs[f"model.layers.{index}.{name}"]).double().norm(dim=0)
            expected = (linear.weight.double().abs() * norms).sum(0).view(-1, width).sum(1)
            torch.testing.assert_close(scores[part][index].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("measure", ["taylor", "activation", "magnitude"])
@each_architecture
def test_a_global_ranking_makes_an_odd_shaped_checkpoint_that_loads(
    tiny_model, token_batches, tiny_tokenizer, tmp_path, architecture, measure
):
    point = {"method": "width", "ratio": 0.4, "importance": measure, "parts": ["mlp", "attention"], "ranking": "global"}
    dense = tiny_model(architecture)
    for parameter in dense.model.layers[2].mlp.parameters():
        parameter.data *= 0.2  # so that one layer loses most
    result = prune(dense, point, token_batches())
    widths = [shape["intermediate_size"] for shape in result.facts["per_layer_shapes"].values()]
    groups = [shape["num_key_value_heads"] for shape in result.facts["per_layer_shapes"].values()]
    assert sum(widths) == 4 * 48 - int(0.4 * 4 * 48) and sum(groups) == 16 - int(0.4 * 16)
    assert min(widths) >= 1 and min(groups) >= 1 and len(set(widths)) > 1
    models.save(result.model, models.Reader(tiny_tokenizer), tmp_path)
    loaded = models.load(models.Source(str(tmp_path)))
    assert torch.equal(logits(loaded, token_batches()[0]), logits(result.model, token_batches()[0]))
    assert (tmp_path / pruned_shapes.MANIFEST).is_file()


def linear_weights(model):
    return {n: m.weight for n, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}


def test_magnitude_zeroes_the_smallest_weights_of_each_matrix(tiny_model):
    dense = {name: weight.clone() for name, weight in linear_weights(tiny_model("llama")).items()}
    point = {"method": "unstructured", "ratio": 0.3, "importance": "magnitude"}
    for name, weight in linear_weights(prune(tiny_model("llama"), point, []).model).items():
        count = int(0.3 * weight.numel())
        assert int((weight == 0).sum()) == count
        kept = weight != 0
        assert torch.equal(weight[kept], dense[name][kept])
        assert dense[name][~kept].abs().max() <= dense[name][kept].abs().min()


def test_scoring_does_not_change_the_model(tiny_model, token_batches):
    model = tiny_model("mistral", attention_dropout=0.5).train()
    model.model.embed_tokens.weight.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = importance.taylor(tower_of(model), ["mlp"], token_batches())
    second = importance.taylor(tower_of(model), ["mlp"], token_batches())
    importance.block_distances(tower_of(model), token_batches())
    assert all(torch.equal(a, b) for a, b in zip(first["mlp"], second["mlp"], strict=True))  # dropout is off
    assert model.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


@each_architecture
def test_block_influence_and_angular_distance_equal_a_direct_computation(tiny_model, token_batches, architecture):
    model, batches = tiny_model(architecture), [*token_batches(), *token_batches(count=1, rows=1, length=6, seed=3)]
    influence = importance.block_distances(tower_of(model), batches)
    angles = importance.block_distances(tower_of(model), batches, span=2, angular=True)

    model.model.norm = torch.nn.Identity()  # otherwise the last of output_hidden_states is normalized
    with torch.no_grad():
        states = [model(input_ids=b, output_hidden_states=True).hidden_states for b in batches]
    states = [torch.cat([s[i].flatten(0, 1) for s in states]).double() for i in range(5)]

    def cosine(a, b):
        return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))

    expected = torch.stack([1 - cosine(states[i], states[i + 1]).mean() for i in range(4)])
    torch.testing.assert_close(influence.double(), expected, atol=1e-6, rtol=1e-5)
    expected = torch.stack([cosine(states[i], states[i + 2]).arccos().mean() / math.pi for i in range(3)])
    torch.testing.assert_close(angles.double(), expected, atol=1e-6, rtol=1e-5)


def test_depth_removes_the_least_influential_blocks_or_a_consecutive_run(tiny_model, token_batches):
    model = damped(tiny_model("llama", num_hidden_layers=6), 1, 4)
    facts = prune(copy.deepcopy(model), {"method": "depth", "ratio": 1 / 3}, token_batches()).facts
    assert facts["removed"] == {"layers": [1, 4]}
    run = prune(model, {"method": "depth", "ratio": 1 / 3, "consecutive": True}, token_batches())
    first, second = run.facts["removed"]["layers"]
    assert second == first + 1 and {first, second} & {1, 4}


def test_removes_structures_of_equal_importance_in_order_of_their_index(tiny_model):
    model = tiny_model("llama")
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    facts = prune(model, {"method": "width", "ratio": 0.25, "importance": "magnitude", "parts": ["mlp"]}, []).facts
    assert facts["removed"]["mlp"] == [list(range(12))] * 4


def test_magnitude_is_the_norm_of_all_weights_of_a_structure(tiny_model):
    model = tiny_model("qwen2")
    scores = importance.magnitude(tower_of(model), ["mlp", "attention"])
    layer = model.model.layers[2]
    mlp, attention = layer.mlp, layer.self_attn
    channel = torch.cat([mlp.gate_proj.weight[5], mlp.up_proj.weight[5], mlp.down_proj.weight[:, 5]])
    torch.testing.assert_close(scores["mlp"][2][5], channel.norm().detach())
    group = [attention.q_proj.weight[8:16], attention.q_proj.bias[8:16], attention.o_proj.weight[:, 8:16]]
    group += [t[4:8] for p in (attention.k_proj, attention.v_proj) for t in (p.weight, p.bias)]
    torch.testing.assert_close(scores["attention"][2][1], torch.cat([t.flatten() for t in group]).norm().detach())


@each_case
def test_the_facts_agree_with_the_saved_files(tiny_model, token_batches, tmp_path, architecture, point):
    dense = tiny_model(architecture, tie_word_embeddings=True)
    dense.save_pretrained(tmp_path / "dense")
    result = prune(dense, point, token_batches(), context_length=100)
    result.model.save_pretrained(tmp_path / "pruned")
    facts = json.loads(json.dumps(result.facts, allow_nan=False))
    config = AutoConfig.from_pretrained(tmp_path / "pruned")
    for stage, folder in (("before", "dense"), ("after", "pruned")):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        assert facts["parameters"][stage] == sum(math.prod(shape) for shape in shapes.values())
        matrices = [shape for name, shape in shapes.items() if name.endswith(("proj.weight", "embed_tokens.weight"))]
        assert facts["macs_per_token"]["linear"][stage] == sum(map(math.prod, matrices))
        columns = sum(shape[1] for name, shape in shapes.items() if "o_proj" in name)
        assert facts["macs_per_token"]["attention"][stage] == 2 * 100 * columns
    assert facts["macs_per_token"]["context_length"] == 100
    assert facts["per_layer_shapes"] == {
        str(layer): {
            key: getattr(config, key) for key in ("intermediate_size", "num_attention_heads", "num_key_value_heads")
        }
        for layer in range(config.num_hidden_layers)
    }
    if "attention" in point.get("parts", []):  # otherwise the default, hidden_size / num_attention_heads, holds
        assert config.head_dim == 4
    assert facts["calibration"] == {"sequences": 6, "tokens": 96}


def test_attention_macs_respect_the_sliding_window(tiny_model, token_batches):
    point = {"method": "depth", "ratio": 0.25}
    facts = prune(tiny_model("mistral", sliding_window=10), point, token_batches(), context_length=100).facts
    assert facts["macs_per_token"]["attention"] == {"before": 2 * 10 * 32 * 4, "after": 2 * 10 * 32 * 3}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_pruned_in_their_own_dtype(tiny_model, token_batches, dtype):
    result = prune(tiny_model("qwen3").to(dtype), POINTS["both-taylor"], token_batches())
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert logits(result.model, token_batches()[0]).isfinite().all()


def test_kept_widths_are_multiples_of_eight_in_wide_models_only():
    config = AutoConfig.for_model("mistral", intermediate_size=14336)
    assert resolve({"method": "width", "ratio": 0.3, "parts": ["mlp"]}, config).changes["intermediate_size"] == 10032
    config.intermediate_size = 1023
    assert resolve({"method": "width", "ratio": 0.3, "parts": ["mlp"]}, config).changes["intermediate_size"] == 716
    config.intermediate_size = 4
    assert resolve({"method": "width", "ratio": 0.99, "parts": ["mlp"]}, config).changes["intermediate_size"] == 1


def test_counts_follow_the_ratio_despite_rounding_errors():
    config = AutoConfig.for_model("qwen3", num_hidden_layers=3, num_attention_heads=20, num_key_value_heads=10)
    assert resolve({"method": "width", "ratio": 0.3, "parts": ["attention"]}, config).remove == {"attention": 3}
    assert resolve({"method": "depth", "ratio": 0.01}, config).remove == {"layers": 1}


def test_warns_of_a_ratio_too_small_for_the_kv_groups(tiny_model, token_batches):
    point = {"method": "width", "ratio": 0.2, "parts": ["mlp", "attention"]}
    facts = prune(tiny_model("llama"), point, token_batches()).facts
    assert len(facts["warnings"]) == 1 and "'attention'" in facts["warnings"][0]
    assert facts["per_layer_shapes"]["0"]["num_key_value_heads"] == 4


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ({"method": "dept", "ratio": 0.5}, "did you mean 'depth'"),
        ({"method": "depth", "ratio": 1}, "between 0 and 1"),
        ({"method": "depth", "ratio": float("nan")}, "between 0 and 1"),
        ({"method": "depth", "ratio": "0.5"}, "'0.5'"),
        ({"method": "depth"}, "None"),
        ({"method": "depth", "ratio": 0.95}, "4 of 4 layers"),
        ({"method": "depth", "ratio": 0.5, "consecutive": "yes"}, "true or false"),
        ({"method": "depth", "ratio": 0.5, "parts": ["mlp"]}, "'parts' is not a key of method 'depth'"),
        ({"method": "width", "ratio": 0.5, "importence": "taylor"}, "did you mean 'importance'"),
        ({"method": "width", "ratio": 0.5, "importance": "wanda2"}, "taylor"),
        ({"method": "width", "ratio": 0.5, "parts": ["mlps"]}, "mlps"),
        ({"method": "width", "ratio": 0.5, "parts": []}, "must list"),
        ({"method": "width", "ratio": 0.2, "parts": ["attention"]}, "nothing would be removed"),
        ({"method": "width", "ratio": 1 - 1e-12, "parts": ["attention"]}, "leave none"),
        ({"method": "width", "ratio": 0.25, "parts": ["attention"]}, "0.5 or 0.75 works"),
        ({"method": "width", "ratio": 0.5, "ranking": "globall"}, "did you mean 'global'"),
        ({"method": "width", "ratio": 0.5, "importance": "wanda"}, "'activation'"),
        ({"method": "unstructured", "ratio": 0.4, "pattern": "2:4"}, "Set 'ratio' to 0.5"),
        ({"method": "unstructured", "ratio": 0.5, "pattern": "1:4"}, "Set 'ratio' to 0.75"),
        ({"method": "unstructured", "ratio": 0.5, "pattern": "half"}, "'2:4' or '4:8'"),
        ({"method": "unstructured", "ratio": 0.6, "pattern": "2:5"}, "a hidden_size that is a multiple of 5"),
    ],
)
def test_rejects_a_grid_point_that_does_not_fit_the_model_with_a_remedy(tiny_model, token_batches, point, words):
    model = tiny_model("llama")
    before = logits(model, token_batches()[0])
    with pytest.raises(SettingsError, match=words):
        prune(model, point, token_batches())
    assert torch.equal(logits(model, token_batches()[0]), before)


def test_rejects_models_and_batches_that_cannot_be_used(tiny_model, token_batches):
    point = {"method": "depth", "ratio": 0.25}
    with pytest.raises(DataError, match="no calibration batches"):
        prune(tiny_model("llama"), point, [])
    with pytest.raises(DataError, match="batch 1"):
        prune(tiny_model("llama"), point, [*token_batches(count=1), torch.zeros(4)])
    gpt = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=8, n_layer=2, n_head=2, vocab_size=128))
    for any_point in POINTS.values():
        with pytest.raises(CheckpointError, match="gpt2"):
            prune(gpt, any_point, token_batches())
    broken = tiny_model("llama")
    broken.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    for bad_point in (point, POINTS["both-taylor"]):
        with pytest.raises(CheckpointError, match="not finite"):
            prune(broken, bad_point, token_batches())
    odd = tiny_model("llama")
    odd.model.layers[1].mlp = tiny_model("llama", intermediate_size=40).model.layers[1].mlp
    with pytest.raises(CheckpointError, match="layer 1 has 40"):
        prune(odd, point, token_batches())
    replaced = tiny_model("llama")
    replaced.model.layers[3].self_attn.v_proj = torch.nn.Sequential(replaced.model.layers[3].self_attn.v_proj)
    with pytest.raises(CheckpointError, match="v_proj is a Sequential"):
        prune(replaced, point, token_batches())


def test_checks_grid_points_without_importing_torch():
    code = "import sys; import coppice.stages.prune; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


def test_a_grid_is_checked_as_a_whole_and_names_every_point_that_does_not_fit(tiny_checkpoint):
    config = tiny_checkpoint("llama") / "config.json"
    grid = {"low": {"method": "depth", "ratio": 0.25}, "high": {"method": "depth", "ratio": 0.95}}
    with pytest.raises(SettingsError, match=r"Mine: candidate high: .*; Mine: candidate none: ") as error:
        check_grid("Mine", config, grid | {"none": {"method": "depth"}})
    assert "candidate low" not in str(error.value)
    check_grid("Mine", config, {"low": grid["low"]})
    check_grid("Mine", "no such file", {})  # a study without a grid
