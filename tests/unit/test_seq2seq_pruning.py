"""Prune encoders and decoders: importance against plain loops, cuts against masks, and checkpoints that load again."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from coppice import data, models
from coppice.core.errors import CheckpointError, SettingsError
from coppice.models import kinds, pruned_shapes
from coppice.stages import prune
from coppice.stages.prune import importance, unstructured
from coppice.stages.prune.candidates import calibration
from tests.unit import tiny_seq2seq

KIND = kinds.named("seq2seq")
TOWERS = ("encoder", "decoder")


def batches(count=3):
    """Return batches of pairs of different lengths, each without padding."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 9 + 2 * place, 5 + place) for place in range(count)]
    draw = [(torch.randint(3, 128, (b, s), generator=generator), (b, t)) for b, s, t in sizes]
    return [{"input_ids": ids, "labels": torch.randint(3, 128, size, generator=generator)} for ids, size in draw]


def tower_of(model, name):
    return next(tower for tower in KIND.towers(model) if tower.anatomy.name == name)


def loss(model, of=None):
    """Return the mean loss of all targets by transformers' own loss."""
    of = batches() if of is None else of
    total = sum(model(**batch).loss * batch["labels"].numel() for batch in of)
    return total / sum(batch["labels"].numel() for batch in of)


def logits(model):
    return torch.cat([KIND.outputs(model, probe)[0] for probe in KIND.probes(model)])


@pytest.mark.parametrize("name", ["flan-t5", "t5", "bart", "mbart"])
@pytest.mark.parametrize("where", TOWERS)
def test_taylor_is_that_of_the_whole_models_gradients(name, where):
    model = tiny_seq2seq.build(name)
    tower = tower_of(model, where)
    parts = list(tower.parts)
    found = importance.taylor(tower, parts, batches())
    loss(model).backward()
    for part in parts:
        for block, scores in zip(tower.blocks, found[part], strict=True):
            expected = 0
            for coupling in tower.parts[part].couplings(block):
                if isinstance(coupling.owner, torch.nn.Embedding):
                    continue
                terms = (coupling.tensor * coupling.tensor.grad).abs()
                rows = terms if terms.dim() == 1 else terms.sum(1 - coupling.dim)
                expected = expected + rows.reshape(len(scores), -1).sum(1)
            torch.testing.assert_close(scores, expected.detach(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["flan-t5", "bart"])
@pytest.mark.parametrize("where", TOWERS)
def test_perplexities_without_a_block_are_those_of_the_model_without_it(name, where):
    model = tiny_seq2seq.build(name)
    found = importance.block_perplexities(tower_of(model, where), batches())
    for missing in (1, 2):
        shorter = copy.deepcopy(model)
        tower_of(shorter, where).keep_blocks([index for index in range(3) if index != missing])
        with torch.no_grad():
            assert float(found[missing]) == pytest.approx(float(loss(shorter).exp()), rel=1e-4)


@pytest.mark.parametrize("where", TOWERS)
def test_activation_sums_weights_times_the_norms_of_their_inputs(where):
    model = tiny_seq2seq.build("flan-t5")
    tower = tower_of(model, where)
    found = importance.activation(tower, ["mlp"], batches())["mlp"]
    last = tower.blocks[1].layer[-1].DenseReluDense.wo
    seen = []
    hook = last.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, 1)))
    loss(model)
    hook.remove()
    expected = (last.weight.abs() * torch.cat(seen).norm(dim=0)).sum(0)
    torch.testing.assert_close(found[1], expected.detach(), rtol=1e-4, atol=1e-6)


def masked(model, where, facts):
    """Return the model with the removed structures' columns of output layers set to zero."""
    zeroed = copy.deepcopy(model)
    tower = tower_of(zeroed, where)
    for part, by_layer in facts.items():
        for block, gone in zip(tower.blocks, by_layer, strict=True):
            last = tower.parts[part].linears_of(block)[-1]
            width = last.in_features // (48 if part == "mlp" else 4)
            for structure in gone:
                last.weight.data[:, structure * width : (structure + 1) * width] = 0
    return zeroed


@pytest.mark.parametrize("measure", ["magnitude", "activation", "taylor", "taylor-second"])
@pytest.mark.parametrize("where", TOWERS)
def test_a_narrower_tower_computes_what_the_dense_one_does_without_the_structures(where, measure, tmp_path):
    model = tiny_seq2seq.build("flan-t5")
    dense = copy.deepcopy(model)
    point = {"method": "width", "tower": where, "ratio": 0.5, "importance": measure, "parts": ["mlp", "attention"]}
    result = prune.prune(model, point, batches())
    heads = result.facts["removed"]["attention"]
    assert all(gone == heads[0] and len(gone) == 2 for gone in heads), "a stack shares its bias of positions"
    expected = logits(masked(dense, where, result.facts["removed"]))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert result.facts["settings"]["tower"] == where
    # one key of the configuration holds the widths of both stacks, so this checkpoint has odd shapes
    models.save(model, models.Reader(tiny_seq2seq.tokenizer()), tmp_path)
    assert (tmp_path / pruned_shapes.MANIFEST).is_file()
    again = models.load(models.Source(str(tmp_path)))
    assert logits(again).equal(logits(model))
    assert models.count_parameters(tmp_path) == models.parameters(again) == result.facts["parameters"]["after"]
    ids = batches()[0]["input_ids"]
    assert again.generate(input_ids=ids, max_new_tokens=4).equal(model.generate(input_ids=ids, max_new_tokens=4))


@pytest.mark.parametrize("name", ["flan-t5", "t5", "mt5"])
def test_both_towers_narrowed_alike_load_in_plain_transformers(name, tmp_path):
    model = tiny_seq2seq.build(name)
    dense = copy.deepcopy(model)
    result = prune.prune(model, {"method": "width", "ratio": 0.25, "parts": ["mlp", "attention"]}, batches())
    zeroed = dense
    for where in TOWERS:
        zeroed = masked(zeroed, where, result.facts["removed"][where])
    torch.testing.assert_close(logits(model), logits(zeroed), rtol=1e-4, atol=1e-4)
    assert (model.config.d_ff, model.config.num_heads) == (36, 3)
    models.save(model, models.Reader(tiny_seq2seq.tokenizer()), tmp_path)
    assert not (tmp_path / pruned_shapes.MANIFEST).exists()
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert logits(plain).equal(logits(model))


@pytest.mark.parametrize("where", TOWERS)
@pytest.mark.parametrize("name", ["bart", "mbart"])
def test_bart_has_a_width_of_each_tower(name, where, tmp_path):
    model = tiny_seq2seq.build(name)
    dense = copy.deepcopy(model)
    result = prune.prune(model, {"method": "width", "tower": where, "ratio": 0.5}, batches())
    torch.testing.assert_close(
        logits(model), logits(masked(dense, where, result.facts["removed"])), rtol=1e-4, atol=1e-4
    )
    model.save_pretrained(tmp_path)
    assert logits(AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()).equal(logits(model))


@pytest.mark.parametrize("name", ["flan-t5", "bart"])
def test_layers_of_different_widths_load_again(name, tmp_path):
    model = tiny_seq2seq.build(name)
    point = {"method": "width", "tower": "decoder", "ratio": 0.5, "ranking": "global"}
    prune.prune(model, point, batches())
    models.save(model, models.Reader(tiny_seq2seq.tokenizer()), tmp_path)
    assert logits(models.load(models.Source(str(tmp_path)))).equal(logits(model))
    (tmp_path / pruned_shapes.MANIFEST).write_text('{"per_layer_config": {"decoder.0": {"d_ff": 3}}}')
    with pytest.raises(CheckpointError, match="Delete the file to have the weights' shapes used"):
        models.load(models.Source(str(tmp_path)))


@pytest.mark.parametrize("name", ["flan-t5", "bart"])
@pytest.mark.parametrize("measure", ["block-influence", "perplexity", "taylor"])
def test_a_shallower_model_loads_in_plain_transformers_and_writes_the_same(name, measure, tmp_path):
    model = tiny_seq2seq.build(name)
    result = prune.prune(model, {"method": "depth", "ratio": 0.34, "importance": measure}, batches())
    gone = {where: result.facts["removed"][where]["layers"] for where in TOWERS}
    assert all(len(layers) == 1 for layers in gone.values())
    if name == "flan-t5":
        assert all(0 not in layers for layers in gone.values()), "the first block holds the bias of positions"
    models.save(model, models.Reader(tiny_seq2seq.tokenizer()), tmp_path)
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert logits(plain).equal(logits(model))
    ids = batches()[0]["input_ids"]
    assert plain.generate(input_ids=ids, max_new_tokens=4).equal(model.generate(input_ids=ids, max_new_tokens=4))


def test_one_tower_may_lose_more_blocks_than_the_other(tmp_path):
    model = tiny_seq2seq.build("flan-t5")
    prune.prune(model, {"method": "depth", "tower": "decoder", "ratio": 0.67}, batches())
    model.save_pretrained(tmp_path)
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert (len(plain.encoder.block), len(plain.decoder.block)) == (3, 1)
    assert logits(plain).equal(logits(model))


@pytest.mark.parametrize("name", ["flan-t5", "bart"])
@pytest.mark.parametrize("measure", ["wanda", "wanda-one-shot", "sparsegpt", "magnitude"])
def test_single_weights_become_zero_in_both_towers(name, measure):
    model = tiny_seq2seq.build(name)
    result = prune.prune(model, {"method": "unstructured", "ratio": 0.5, "importance": measure}, batches(6))
    linears = [
        linear
        for where in TOWERS
        for block in tower_of(model, where).blocks
        for linear in unstructured.linears_of(block)
    ]
    shares = [float((linear.weight == 0).float().mean()) for linear in linears]
    assert len(linears) > 20 and all(share == pytest.approx(0.5, abs=0.03) for share in shares)
    assert result.facts["sparsity"]["zeros"] > 0


def test_wanda_measures_a_block_on_what_the_pruned_blocks_before_it_make():
    model = tiny_seq2seq.build("flan-t5")
    tower, seen = tower_of(model, "encoder"), []
    prune.prune(model, {"method": "unstructured", "tower": "encoder", "ratio": 0.5}, batches())
    rerun = copy.deepcopy(tiny_seq2seq.build("flan-t5"))
    for index in (0, 1):
        rerun.encoder.block[index].load_state_dict(model.encoder.block[index].state_dict())
    layer = rerun.encoder.block[2].layer[-1].DenseReluDense
    layer.wi_0.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, 1)))
    loss(rerun)
    scores = layer.wi_0.weight.detach().abs() * torch.cat(seen).norm(dim=0)
    kept = scores > scores.kthvalue(16, dim=1, keepdim=True).values
    assert tower.blocks[2].layer[-1].DenseReluDense.wi_0.weight.ne(0).equal(kept)


@pytest.mark.parametrize(
    ("name", "point", "message"),
    [
        ("bart", {"method": "width", "ratio": 0.5, "parts": ["attention"]}, r"Set 'parts' to \['mlp'\]"),
        ("flan-t5", {"method": "depth", "ratio": 0.5, "tower": "text"}, r"'tower' is 'text', but must be one of"),
        (
            "flan-t5",
            {"method": "width", "ratio": 0.5, "parts": ["attention"], "ranking": "global"},
            "must lose the same heads, because they share a bias of positions",
        ),
        ("flan-t5", {"method": "depth", "ratio": 0.9}, r"and 2 are free\. Lower 'ratio'"),
    ],
)
def test_a_point_that_the_model_cannot_take_is_refused_by_its_configuration(name, point, message, tmp_path):
    folder = tiny_seq2seq.save(tmp_path, name)
    with pytest.raises(SettingsError, match=message):
        prune.check_grid("M", folder / "config.json", {"one": point})


def test_calibration_takes_random_rows_in_batches_of_equal_lengths(tmp_path):
    rows = [{"input": " ".join(["w5"] * (1 + i % 3)), "target": f"w{10 + i}"} for i in range(20)]
    data.write("pairs", {"train": rows}, tmp_path)
    wanted = {"record": tmp_path / "dataset.json", "dataset": "pairs", "samples": 8, "length": 32}
    reader = models.Reader(tiny_seq2seq.tokenizer())
    found, _ = calibration.batches(KIND, reader, wanted, 512, 1)
    again, _ = calibration.batches(KIND, reader, wanted, 512, 1)
    assert sum(len(batch["input_ids"]) for batch in found) == 8
    assert [batch["input_ids"].shape[1] for batch in found] == sorted({batch["input_ids"].shape[1] for batch in found})
    assert all(one["labels"].equal(other["labels"]) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("flan-t5", {"d_ff": 64}, "every block has .* Use the config.json that belongs"),
        ("flan-t5", {"num_heads": 3}, r"more than config\.json's"),
        ("bart", {"decoder_layers": 4}, r"a block model\.decoder\.layers\.3, but it has no fc1\.weight"),
    ],
)
def test_a_configuration_of_another_model_is_refused(name, changes, message, tmp_path):
    folder = tiny_seq2seq.save(tmp_path, name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=message):
        models.load(models.Source(str(folder)))


def test_an_odd_shaped_model_is_built_without_weights(tmp_path):
    model = tiny_seq2seq.build("flan-t5")
    prune.prune(model, {"method": "width", "tower": "encoder", "ratio": 0.5, "parts": ["mlp", "attention"]}, batches())
    models.save(model, models.Reader(tiny_seq2seq.tokenizer()), tmp_path)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.named_parameters()}
    skeleton = models.skeleton(models.Source(str(tmp_path)))
    # the output layer is a tensor of its own, which only the weights show
    assert {key: tuple(tensor.shape) for key, tensor in skeleton.named_parameters()} == {
        key: shape for key, shape in shapes.items() if key != "lm_head.weight"
    }
