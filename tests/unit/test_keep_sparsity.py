"""What pruning set to zero stays zero: in full fine-tuning, in merged adapters, and in what the records say."""

import pytest
import torch
from safetensors.torch import load_file
from test_finetuning import SETTINGS, adapter_of, dataset, train  # noqa: F401 - `dataset` is a fixture

from coppice import data, models
from coppice.cli import single_jobs
from coppice.core import records
from coppice.core.errors import CheckpointError, SettingsError
from coppice.models import sparsity
from coppice.stages import evaluate
from coppice.stages.recover import MODEL
from coppice.stages.recover.full import AllWeights

FULL = {key: value for key, value in SETTINGS.items() if key != "lora"} | {"train": "all", "learning_rate": 1e-3}
FULL |= {"lora": SETTINGS["lora"], "weight_decay": 0.1}


def is_pruned(name):
    return "_proj" in name


@pytest.fixture
def start(tiny_checkpoint):
    """Return a checkpoint whose linear layers hold two zeros in every four weights."""
    folder = tiny_checkpoint("llama")
    model = models.load(models.Source(str(folder)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_pruned(name):
                groups = parameter.view(-1, 4)
                groups.scatter_(1, groups.abs().argsort(1)[:, :2], 0)
    model.save_pretrained(folder)
    return folder


def zeros_of(folder):
    return {name: tensor == 0 for name, tensor in load_file(folder / "model.safetensors").items() if is_pruned(name)}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first | second)


def test_counts_the_zeros_of_linear_layers_and_recognizes_their_pattern(start, tiny_checkpoint):
    found = sparsity.measure(models.load(models.Source(str(start))))
    expected = load_file(start / "model.safetensors")
    linear = [tensor for name, tensor in expected.items() if is_pruned(name) or name == "lm_head.weight"]
    assert found["weights"] == sum(tensor.numel() for tensor in linear)
    assert found["zeros"] == sum(int((tensor == 0).sum()) for tensor in linear)
    assert found["pattern"] == "2:4" and sparsity.is_sparse(found)
    dense = sparsity.measure(models.load(models.Source(str(tiny_checkpoint("llama")))))
    assert dense["zeros"] == 0 and dense["pattern"] is None and not sparsity.is_sparse(dense)


def test_full_training_keeps_the_zeros(start, dataset, tmp_path):  # noqa: F811
    record = train(start, dataset, tmp_path, FULL)
    assert same(zeros_of(tmp_path / MODEL), zeros_of(start))
    assert record["sparsity"]["before"] == record["sparsity"]["after"] and record["sparsity"]["mode"] == "mask"
    assert not any("sparse" in warning for warning in record["warnings"])
    before, after = (load_file(folder / "model.safetensors") for folder in (start, tmp_path / MODEL))
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])


def test_a_stopped_full_training_resumes_under_the_mask(start, dataset, tmp_path):  # noqa: F811
    train(start, dataset, tmp_path / "whole", FULL)
    output = tmp_path / "resumed"
    train(start, dataset, output, FULL)
    newest = output / "checkpoint-6"
    (newest / "model.safetensors").write_bytes(b"torn")  # so that it goes on from the one before
    (output / ".finished.json").unlink()
    train(start, dataset, output, FULL)
    whole, resumed = (load_file(folder / MODEL / "model.safetensors") for folder in (tmp_path / "whole", output))
    assert same(whole, resumed) and same(zeros_of(output / MODEL), zeros_of(start))


def test_full_training_learns_as_if_the_zeros_were_no_weights(start, dataset, tmp_path):  # noqa: F811
    """Compared with a loop in float64 that takes the gradients of zeros out before it clips the others."""
    train(
        start, dataset, tmp_path / "kept", FULL | {"max_steps": 1, "warmup_steps": 0, "eval_steps": 1, "save_steps": 1}
    )
    model = models.load(models.Source(str(start)), train=True).double()
    kept = {name: parameter != 0 for name, parameter in model.named_parameters() if is_pruned(name)}
    examples = _examples(start, dataset)
    optimizer = torch.optim.AdamW(_groups(model), lr=1e-3)
    total = sum(len(row["input_ids"]) - row["labels"].count(-100) for row in examples)
    for row in examples:
        ids = torch.tensor([row["input_ids"]])
        labels = torch.tensor([row["labels"]])[:, 1:]
        logits = model(ids).logits[:, :-1]
        (torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / total).backward()
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.grad *= kept[name]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    found = load_file(tmp_path / "kept" / MODEL / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name].double(), parameter.detach(), atol=2e-5), name


def _groups(model):
    """Weight decay for matrices, as Trainer has it."""
    decayed = [p for n, p in model.named_parameters() if "norm" not in n]
    return [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if "norm" in n], "weight_decay": 0.0},
    ]


def _examples(folder, record):
    """Return the examples of the first step."""
    from coppice.models import causal_lm
    from coppice.stages.recover import TrainingSettings, examples
    from coppice.stages.recover.engine.loader import StepSampler

    wanted = TrainingSettings.model_validate(FULL).data
    reader = models.Reader(models.load_tokenizer(str(folder)))
    rows, _, _ = examples.prepare({"mine": record}, wanted, "none", reader, 3, causal_lm.KIND)
    return [rows[index] for index in next(iter(StepSampler(len(rows), 8, 3)))]


def test_an_optimizer_that_moves_weights_without_gradient_loses_no_zero(start):
    trained, source = AllWeights(), models.Source(str(start))
    from coppice.models import causal_lm
    from coppice.stages.recover import TrainingSettings

    how = TrainingSettings.model_validate(FULL)
    model = trained.prepare(models.load(source, train=True), causal_lm.KIND, source, how, [])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # as after orthogonalizing a gradient (Muon)
    trained.after_step(model)
    found = {name: parameter == 0 for name, parameter in model.named_parameters() if is_pruned(name)}
    assert same(found, zeros_of(start))
    assert not any("kept" in name for name in model.state_dict())


def test_full_training_without_the_mask_says_what_it_lost(start, dataset, tmp_path):  # noqa: F811
    record = train(start, dataset, tmp_path, FULL | {"keep_sparsity": "off"})
    assert not any(mask.any() for mask in zeros_of(tmp_path / MODEL).values())
    assert record["sparsity"]["after"]["zeros"] == 0 < record["sparsity"]["before"]["zeros"]
    assert any("is not sparse" in warning for warning in record["warnings"])


def test_a_merged_adapter_keeps_the_zeros_and_the_record_says_what_the_mask_costs(start, dataset, tmp_path):  # noqa: F811
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    record = train(start, dataset, tmp_path, SETTINGS | {"merge": True})
    assert same(zeros_of(tmp_path / "merged"), zeros_of(start))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), tmp_path).merge_and_unload()
    kept, merged = zeros_of(start), load_file(tmp_path / "merged/model.safetensors")
    for name, parameter in plain.named_parameters():
        expected = parameter.masked_fill(kept[name], 0) if name in kept else parameter
        assert torch.allclose(merged[name], expected, atol=1e-5), name
    assert record["sparsity"]["before"] == record["sparsity"]["after"]
    losses = record["sparsity"]["mask_loss"]
    assert losses["adapter"] == pytest.approx(record["validation_loss"], rel=1e-4)
    assert losses["masked"] != pytest.approx(losses["adapter"], rel=1e-4)
    assert any("merged with the zeros kept" in warning for warning in record["warnings"])


@pytest.mark.parametrize("changes", [{"init": "pissa"}, {"use_dora": True}], ids=["PiSSA", "DoRA"])
def test_every_kind_of_adapter_merges_under_the_mask(start, dataset, tmp_path, changes):  # noqa: F811
    """PiSSA takes its first adapter out of the weights, so that these are dense while they are trained."""
    train(start, dataset, tmp_path, SETTINGS | {"merge": True, "lora": SETTINGS["lora"] | changes})
    assert same(zeros_of(tmp_path / "merged"), zeros_of(start))
    assert "stay zero only if the adapter is merged under their mask" in (tmp_path / "README.md").read_text()


def test_a_pruned_output_layer_that_is_trained_whole_keeps_its_zeros(start):
    from peft import LoraConfig, get_peft_model

    model = models.load(models.Source(str(start)))
    with torch.no_grad():
        model.lm_head.weight[:, ::2] = 0
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    merged = sparsity.merge(adapted, keep_zeros=True)
    assert torch.equal(merged.lm_head.weight == 0, model.lm_head.weight == 0) and not merged.lm_head.weight[:, 0].any()
    assert sparsity.measure(merged)["pattern"] == "2:4" and merged.lm_head.weight[:, 1].any()


def test_a_dense_merge_has_dense_in_its_name(start, dataset, tmp_path):  # noqa: F811
    record = train(start, dataset, tmp_path, SETTINGS | {"merge": True, "keep_sparsity": "off"})
    assert not (tmp_path / "merged").exists()
    assert not any(mask.any() for mask in zeros_of(tmp_path / "merged-dense").values())
    assert record["sparsity"]["after"]["zeros"] == 0
    assert any("merging the adapter leaves 0.0 % zeros" in warning for warning in record["warnings"])


@pytest.mark.parametrize("settings", [FULL, SETTINGS | {"merge": True}])
def test_refuses_to_fill_zeros_that_must_stay(start, dataset, tmp_path, settings):  # noqa: F811
    with pytest.raises(SettingsError, match=r"finetune\.keep_sparsity: is merge-refused.*% zeros \(2:4\)"):
        train(start, dataset, tmp_path, settings | {"keep_sparsity": "merge-refused"})


def test_an_adapter_beside_the_weights_is_trained_alike_in_every_mode(start, dataset, tmp_path):  # noqa: F811
    found = {}
    for mode in ("mask", "merge-refused", "off"):
        record = train(start, dataset, tmp_path / mode, SETTINGS | {"keep_sparsity": mode})
        found[mode] = adapter_of(tmp_path / mode)
        assert record["sparsity"]["before"]["pattern"] == "2:4"
    assert same(found["mask"], found["off"]) and same(found["mask"], found["merge-refused"])


def test_nothing_changes_for_a_dense_checkpoint(tiny_checkpoint, dataset, tmp_path):  # noqa: F811
    folder = tiny_checkpoint("llama")
    for settings, file in (
        (FULL, f"{MODEL}/model.safetensors"),
        (SETTINGS | {"merge": True}, "merged/model.safetensors"),
    ):
        outputs = [tmp_path / f"{settings.get('train')}-{mode}" for mode in ("mask", "merge-refused", "off")]
        found = [
            train(folder, dataset, out, settings | {"keep_sparsity": out.name.split("-", 1)[1]}) for out in outputs
        ]
        assert all(same(load_file(outputs[0] / file), load_file(out / file)) for out in outputs[1:])
        assert all(
            record["sparsity"]["before"]["zeros"] == 0 and record["sparsity"]["mask_loss"] is None for record in found
        )
        assert not any("zeros" in warning for record in found for warning in record["warnings"])


def test_generate_merges_with_the_zeros_or_names_the_folder_dense(start, dataset, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    train(start, dataset, tmp_path / "adapter")

    def merged(folder, mode):
        asked = {"merge": True, "output": str(tmp_path / folder), "keep_sparsity": mode, "prompt": "none"}
        single_jobs.generate(single_jobs.Questions(str(start), str(tmp_path / "adapter"), ["w5"], **asked))
        return zeros_of(tmp_path / folder)

    assert same(merged("kept", "mask"), zeros_of(start))
    with pytest.raises(CheckpointError, match=r"0\.0 % zeros, but it was pruned to .*put 'dense' in the folder's name"):
        merged("wanda-tuned", "off")
    assert not any(mask.any() for mask in merged("wanda-tuned-dense", "off").values())


@pytest.fixture
def texts(tmp_path):
    rows = [{"text": " ".join(f"w{3 + (7 * i + j) % 120}" for j in range(40))} for i in range(8)]
    data.write("ptb", dict.fromkeys(data.ROLES, rows), tmp_path / "ptb")
    return {"ptb": str(tmp_path / "ptb/dataset.json")}


def evaluated(folder, texts, output, adapter=None):
    wanted = {"perplexity": {"datasets": ["ptb"]}, "zero_shot": {"tasks": []}, "cost": {"enabled": False}}
    identity = {"model": "M", "config": "c", "stage": "finetuned"}
    settings = evaluate.Evaluate.model_validate(wanted)
    request = evaluate.EvaluationRequest(identity, models.Source(str(folder)), settings, texts, output, adapter)
    evaluate.evaluate(request)
    return records.read(output / "evaluation_results.json")


@pytest.mark.parametrize("mode", ["mask", "off"])
def test_an_evaluation_counts_zeros_and_measures_the_merge_that_keeps_them(start, dataset, texts, tmp_path, mode):  # noqa: F811
    train(start, dataset, tmp_path / "tuned", SETTINGS | {"merge": True, "keep_sparsity": mode})
    record = evaluated(start, texts, tmp_path / "beside", tmp_path / "tuned")
    assert record["sparsity"] == sparsity.measure(models.load(models.Source(str(start))))
    if mode == "off":
        assert record["masked_merge"] is None and record["merge_drift"]["max_logit_difference"] < 1e-3
        return
    merged = evaluated(tmp_path / "tuned/merged", texts, tmp_path / "merged")
    assert merged["sparsity"]["zeros"] == record["sparsity"]["zeros"] and merged["masked_merge"] is None
    expected = merged["perplexity"]["ptb"]["value"]
    assert record["masked_merge"]["perplexity"]["ptb"] == pytest.approx(expected, rel=1e-5)
    assert record["perplexity"]["ptb"]["value"] != pytest.approx(expected, rel=1e-3)


def test_a_pruned_candidate_records_its_zeros(tiny_model):
    from coppice.stages import prune

    model = tiny_model("llama")
    point = {"method": "unstructured", "importance": "magnitude", "ratio": 0.5, "pattern": "2:4"}
    facts = prune.prune(model, point, []).facts
    assert facts["sparsity"] == sparsity.measure(model)
    linears = [p for name, p in model.named_parameters() if is_pruned(name)]
    assert facts["sparsity"]["zeros"] == sum(p.numel() for p in linears) // 2 and facts["sparsity"]["pattern"] == "2:4"


@pytest.mark.slow
def test_two_processes_keep_the_zeros(start, dataset, tmp_path):  # noqa: F811
    record = train(start, dataset, tmp_path, FULL, world=2)
    assert record["processes"] == 2 and same(zeros_of(tmp_path / MODEL), zeros_of(start))
