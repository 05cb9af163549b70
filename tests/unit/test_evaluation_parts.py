"""The parts of an evaluation: resumed, extended and never reused for another model; guards; the cost of a model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch

from coppice import data, models
from coppice.core import records
from coppice.core.errors import CheckpointError, CoppiceError, DataError
from coppice.stages import evaluate
from coppice.stages.evaluate import perplexity, zero_shot
from coppice.study.settings.sections.evaluate import ZeroShot

TIMES = {"started", "seconds", "peak_memory_bytes"}
IDENTITY = {"model": "Llama", "config": "best_acc", "stage": "finetuned"}


def words(seed, count):
    return " ".join(f"w{3 + (seed * 37 + i * i * 11 + i) % 125}" for i in range(count))


def piqa(seed, count):
    return [
        {"goal": words(seed + i, 8), "sol1": words(i, 4), "sol2": words(i + 50, 5), "label": i % 2}
        for i in range(count)
    ]


def arc(seed, count):
    choices = [{"text": [words(seed + i + k, 3 + k) for k in range(4)], "label": list("ABCD")} for i in range(count)]
    return [{"question": words(seed + i, 9), "choices": choices[i], "answerKey": "ABCD"[i % 4]} for i in range(count)]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Return {name: dataset.json} of two texts and three tasks, each with three roles of different rows."""
    folder = tmp_path_factory.mktemp("datasets")
    makers = {
        "wikitext2": lambda seed: [{"text": words(seed + i, 30)} for i in range(12)],
        "ptb": lambda seed: [{"text": words(seed + 3 * i, 25)} for i in range(12)],
        "piqa": lambda seed: piqa(seed, 12),
        "arc_easy": lambda seed: arc(seed, 10),
        "arc_challenge": lambda seed: arc(seed + 3, 10),
    }
    for name, make in makers.items():
        tables = {role: make(100 * place) for place, role in enumerate(data.ROLES)}
        data.write(name, tables, folder / name)
    return {name: str(folder / name / "dataset.json") for name in makers}


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def new_adapter(checkpoint, tmp_path_factory):
    """Return `build(seed, scale)`, which makes the folder of a LoRA adapter with random weights."""

    def build(seed=0, scale=0.2):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(models.load(models.Source(str(checkpoint))), LoraConfig(target_modules="all-linear"))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * scale
        folder = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(folder)
        return folder

    return build


@pytest.fixture(scope="module")
def adapter(new_adapter):
    return new_adapter()


def settings(tasks=("piqa", "arc_easy", "arc_challenge"), texts=("wikitext2", "ptb"), cost=False, **zero_shot_options):
    return {
        "perplexity": {"datasets": list(texts), "protocol": "gptq-2048", "protocols": {}},
        "zero_shot": {"tasks": list(tasks), "metric": {"arc_challenge": "acc_norm"}, "limit": None} | zero_shot_options,
        "engine": "prefix-tree",
        "batch_size": 4,
        "generation": {"prompts": []},
        "cost": {"enabled": cost, "batch_sizes": [1, 2], "prompt_tokens": 16, "new_tokens": 4},
    }


@pytest.fixture
def evaluated(checkpoint, datasets, adapter):
    def run(output, choice=None, adapter=adapter, source=checkpoint, **options):
        evaluate.evaluate(
            evaluate.EvaluationRequest(
                IDENTITY,
                models.Source(str(source)),
                evaluate.Evaluate.model_validate(choice or settings()),
                datasets,
                output,
                adapter=adapter,
                **options,
            )
        )
        return records.read(output / "evaluation_results.json")

    return run


def test_a_change_of_a_models_own_code_invalidates_its_parts_and_training(checkpoint, tmp_path):
    """Its weights and their fingerprint do not change: the numbers of the old code would be reused."""
    from coppice.stages.recover import training
    from coppice.stages.recover.training_request import TrainingRequest, TrainingSettings

    folder, found = shutil.copytree(checkpoint, tmp_path / "model"), {False: [], True: []}
    for code in ("old", "new"):
        (folder / "modeling_mine.py").write_text(f"# {code}")
        for trusted, keys in found.items():
            source = models.Source(str(folder), trust_remote_code=trusted)
            request = TrainingRequest({}, source, {}, TrainingSettings(), "none", tmp_path / "out")
            keys.append([evaluate._common(source, {}), training._key({"lora": {}}, {}, request)])
    (before, after), (plain, still) = found[True], found[False]
    assert plain == still and before[0] != after[0] and before[1] != after[1]


def record_measurements(monkeypatch):
    """Return a list that fills with the names of what is measured from now on."""
    done = []
    for module, position in ((zero_shot, 1), (perplexity, 3)):
        original = module.measure

        def spy(*arguments, original=original, position=position, **options):
            found = original(*arguments, **options)
            done.append(arguments[position])
            return found

        monkeypatch.setattr(module, "measure", spy)
    return done


def without_times(record):
    return record | {"provenance": {k: v for k, v in record["provenance"].items() if k not in TIMES}}


def contents(folder):
    """Return {name: content} of all declared outputs of an evaluation, without times."""
    found = {
        name: without_times(records.read(folder / name)) for name in ("evaluation_results.json", "ppl_results.json")
    }
    return found | {p.name: p.read_bytes() for p in sorted((folder / "samples").glob("*.parquet"))}


KILLED = """
import os, signal
from coppice.stages.evaluate import zero_shot
original, asked = zero_shot.measure, []
def dies(lm, name, *arguments, **options):
    asked.append(name)
    if len(asked) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(lm, name, *arguments, **options)
zero_shot.measure = dies
"""


def in_new_process(code, checkpoint, adapter, datasets, output, choice):
    """Run `code` and then an evaluation in a new process; return its exit status."""
    call = (
        f"request = evaluate.EvaluationRequest({IDENTITY!r}, models.Source({str(checkpoint)!r}), "
        f"evaluate.Evaluate.model_validate({choice!r}), "
        f"{datasets!r}, Path({str(output)!r}), adapter={str(adapter)!r})\nevaluate.evaluate(request)\n"
    )
    lazy = "" if code else "import sys\nassert not {'torch', 'transformers'} & sys.modules.keys()\n"
    imports = "from pathlib import Path\nfrom coppice import models\nfrom coppice.stages import evaluate\n"
    script = imports + code + call + lazy
    return subprocess.run([sys.executable, "-c", script], cwd=Path(evaluate.__file__).parents[3]).returncode


@pytest.mark.slow
def test_a_killed_evaluation_resumes_to_the_same_files(evaluated, checkpoint, adapter, datasets, monkeypatch, tmp_path):
    evaluated(tmp_path / "undisturbed")
    assert in_new_process(KILLED, checkpoint, adapter, datasets, tmp_path / "killed", settings()) == -9
    assert not (tmp_path / "killed/evaluation_results.json").exists()
    done = record_measurements(monkeypatch)
    evaluated(tmp_path / "killed")
    assert done == ["arc_challenge"]
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


def test_measures_only_the_added_task_after_a_change_of_tasks_and_metric(evaluated, monkeypatch, tmp_path):
    evaluated(tmp_path, settings(tasks=["piqa"]))
    done = record_measurements(monkeypatch)
    choice = settings(tasks=["piqa", "arc_easy"])
    choice["zero_shot"]["metric"]["piqa"] = "acc_norm"
    record = evaluated(tmp_path, choice)
    assert done == ["arc_easy"]
    assert record["zero_shot"]["piqa"]["metric"] == "acc_norm"
    assert record["zero_shot"]["piqa"]["value"] == record["zero_shot"]["piqa"]["acc_norm"]
    samples = pandas.read_parquet(tmp_path / "samples/piqa.parquet")
    assert samples["correct"].mean() == pytest.approx(record["zero_shot"]["piqa"]["value"])


def test_removes_parts_that_no_setting_asks_for(evaluated, tmp_path):
    evaluated(tmp_path, settings(tasks=["piqa", "arc_easy"]))
    before = len(list((tmp_path / ".parts").iterdir()))
    evaluated(tmp_path, settings(tasks=["piqa"]))
    assert len(list((tmp_path / ".parts").iterdir())) == before - 2


@pytest.mark.parametrize("what", ["adapter", "no adapter", "weights", "tokenizer", "limit", "rows", "dtype"])
def test_never_reuses_a_part_of_another_model_or_setting(
    evaluated, new_adapter, checkpoint, tiny_checkpoint, datasets, monkeypatch, tmp_path, what
):
    choice = settings(tasks=["piqa"], texts=["ptb"])
    evaluated(tmp_path / "out", choice)
    done = record_measurements(monkeypatch)
    options = {}
    if what == "adapter":
        options["adapter"] = new_adapter(seed=1)
    elif what == "no adapter":
        options["adapter"] = None
    elif what == "weights":
        options["source"] = tiny_checkpoint("llama", seed=1)
    elif what == "tokenizer":
        shutil.copytree(checkpoint, tmp_path / "other")
        file = tmp_path / "other/tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"clean_up_tokenization_spaces": True}))
        options["source"] = tmp_path / "other"
    elif what == "limit":
        choice["zero_shot"]["limit"] = 5
    elif what == "rows":
        options["purpose"] = "selection"
    if what == "dtype":
        source = models.Source(str(checkpoint), dtype="float64")
        evaluate.evaluate(
            evaluate.EvaluationRequest(
                IDENTITY, source, evaluate.Evaluate.model_validate(choice), datasets, tmp_path / "out"
            )
        )
    else:
        evaluated(tmp_path / "out", choice, **options)
    assert set(done) == ({"piqa"} if what == "limit" else {"piqa", "ptb"})


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_computes_a_damaged_part_again(evaluated, monkeypatch, tmp_path, suffix):
    evaluated(tmp_path, settings(tasks=["piqa"], texts=[]))
    expected = contents(tmp_path)
    path = next(
        path for path in (tmp_path / ".parts").glob("*.json") if json.loads(path.read_text())["kind"] == "task"
    ).with_suffix(suffix)
    path.write_bytes(path.read_bytes()[:-20])
    done = record_measurements(monkeypatch)
    evaluated(tmp_path, settings(tasks=["piqa"], texts=[]))
    assert done == ["piqa"] and contents(tmp_path) == expected


def test_assembles_a_finished_evaluation_without_torch(evaluated, checkpoint, adapter, datasets, tmp_path):
    evaluated(tmp_path, settings(cost=True))
    expected = contents(tmp_path)
    (tmp_path / "evaluation_results.json").unlink()
    assert in_new_process("", checkpoint, adapter, datasets, tmp_path, settings(cost=True)) == 0
    assert contents(tmp_path) == expected


def test_records_the_effect_of_the_adapter_and_of_merging_it(evaluated, tmp_path):
    record = evaluated(tmp_path, settings(tasks=[], texts=[]))
    assert record["adapter_effect"]["max_logit_difference"] > 0.1
    assert 0 <= record["merge_drift"]["max_logit_difference"] < 1e-3 * record["merge_drift"]["max_logit"]
    assert record["average_acc"] is None and record["cost"] is None
    dense = evaluated(tmp_path / "dense", settings(tasks=[], texts=[]), adapter=None)
    assert dense["adapter_effect"] is None and dense["merge_drift"] is None
    assert dense["parameters"] == record["parameters"] and record["adapter_parameters"] > 0


def test_rejects_an_adapter_that_changes_no_logit(evaluated, new_adapter, tmp_path):
    # not zero, so that loading accepts it, but far too small to change any float32 product
    with pytest.raises(CheckpointError, match="changes no logit"):
        evaluated(tmp_path, settings(tasks=[], texts=[]), adapter=new_adapter(scale=1e-30))


def test_measures_the_cost_and_sizes_of_the_merged_model(evaluated, checkpoint, tmp_path):
    cost = evaluated(tmp_path, settings(tasks=[], texts=[], cost=True))["cost"]
    plain = models.load(models.Source(str(checkpoint)))
    assert cost["adapter_merged"] and cost["parameters"] == models.parameters(plain)
    assert cost["weight_bytes"] == 4 * cost["parameters"] >= 4 * cost["nonzero_parameters"] > 0
    # 4 layers of q, o 32x32, k, v 32x16, three MLP matrices 32x48, and the output layer 128x32
    assert cost["macs_per_token"]["linear"] == 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 128 * 32
    assert "speed" not in cost  # other jobs run beside an evaluation, see tests/unit/test_latency.py
    assert cost["peak_memory_bytes"]["host"] > 0


def test_measures_several_protocols_and_takes_the_first_as_the_result(evaluated, tmp_path):
    choice = settings(tasks=[], texts=["ptb"])
    choice["perplexity"]["protocols"] = {"mine": {"seq_len": 32, "stride": 16, "join": " ", "role": "train"}}
    choice["perplexity"]["protocol"] = ["llmpruner-128", "mine"]
    record = evaluated(tmp_path, choice)
    assert record["perplexity"]["ptb"]["protocol"]["name"] == "llmpruner-128"
    mine = record["perplexity_more"]["mine"]["ptb"]
    assert mine["protocol"] == {
        "name": "mine",
        "split": "train",
        "join": " ",
        "seq_len": 32,
        "stride": 16,
        "bos": "none",
        "bos_counts": True,
        "version": 1,
    }
    losses = records.read(tmp_path / "ppl_results.json")
    assert len(losses["perplexity_more"]["mine"]["ptb"]["window_losses"]) == mine["windows"]
    prints = record["provenance"]["fingerprints"]["datasets"]
    assert prints["ptb"] != prints["ptb (mine)"]


def pruned_records(tmp_path, folder, fingerprint, dense, method="depth"):
    """Write pruning.json of the checkpoint `folder` and model.json of the `dense` one; return both paths."""
    from coppice.core import fingerprints

    records.write(
        tmp_path / "pruning.json",
        {
            "candidate": "c",
            "weights_fingerprint": fingerprint,
            "settings": {"method": method},
            "parameters": {"after": models.count_parameters(folder)},
        },
    )
    facts = {"path": str(dense), "weights_fingerprint": fingerprints.weights(dense)}
    records.write(tmp_path / "model.json", facts | {"parameters": models.count_parameters(dense)})
    return {"candidate": tmp_path / "pruning.json", "dense": tmp_path / "model.json"}


@pytest.mark.parametrize("case", ["the dense model", "as many parameters", "another checkpoint", "imported", "pruned"])
def test_rejects_a_pruned_model_other_than_the_candidate(evaluated, checkpoint, tiny_checkpoint, tmp_path, case):
    from coppice.core import fingerprints

    layers = 3 if case in ("pruned", "another checkpoint") else 4
    folder = checkpoint if case == "the dense model" else tiny_checkpoint("llama", seed=5, num_hidden_layers=layers)
    fingerprint = "0" * 64 if case == "another checkpoint" else fingerprints.weights(folder)
    options = pruned_records(tmp_path, folder, fingerprint, checkpoint, "imported" if case == "imported" else "depth")
    run = {"choice": settings(tasks=[], texts=[]), "adapter": None, "source": folder} | options
    if case in ("pruned", "imported"):
        assert evaluated(tmp_path / "out", **run)["parameters"] > 0
        return
    expected_words = {
        "the dense model": "has the dense model's weights",
        "as many parameters": "pruned by depth, but has",
        "another checkpoint": "not those of candidate c",
    }[case]
    with pytest.raises(CheckpointError, match=expected_words):
        evaluated(tmp_path / "out", **run)


def test_keeps_a_folder_that_is_not_a_part(evaluated, tmp_path):
    mine = tmp_path / "out/.parts/mine"
    mine.mkdir(parents=True)
    (mine.parent / "unused.json").write_text("{}")
    evaluated(tmp_path / "out", settings(tasks=[], texts=["ptb"]), adapter=None)
    assert mine.is_dir() and not (mine.parent / "unused.json").exists()


def test_rejects_a_model_that_scores_nan(checkpoint, tmp_path, datasets):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(checkpoint, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for choice, expected_words in ((settings(texts=[]), "NaN"), (settings(tasks=[]), "perplexity on wikitext2 is nan")):
        with pytest.raises(CoppiceError, match=expected_words) as raised:
            evaluate.evaluate(
                evaluate.EvaluationRequest(
                    IDENTITY,
                    models.Source(str(folder)),
                    evaluate.Evaluate.model_validate(choice),
                    datasets,
                    tmp_path / "out",
                )
            )
        assert str(raised.value).startswith(f"{folder}: ") and "leave it out" in str(raised.value)
    assert not list((tmp_path / "out").glob("*.json"))


def test_names_an_adapter_that_makes_the_model_score_nan(evaluated, new_adapter, checkpoint, tmp_path):
    broken = new_adapter(scale=float("nan"))
    with pytest.raises(CoppiceError, match=r"lower finetune\.learning_rate") as raised:
        evaluated(tmp_path / "out", settings(tasks=[], texts=["ptb"]), adapter=broken)
    assert str(raised.value).startswith(f"{broken} on {checkpoint}: ")


def test_rejects_a_task_whose_filter_leaves_no_row(checkpoint, tmp_path, datasets, tiny_tokenizer):
    (tmp_path / "code.py").write_text("def none(rows):\n    return rows.filter(lambda row: False)\n")
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: nowhere\ntest_split: test\noutput_type: multiple_choice\n"
        "process_docs: !function code.none\ndoc_to_text: goal\ndoc_to_target: label\ndoc_to_choice: [a, b]\n"
    )
    with pytest.raises(DataError, match="no items"):
        zero_shot.task("mine", datasets["piqa"], "report", ZeroShot(include_path=str(tmp_path)))
