"""Evaluation as the workflow calls it: the fields of the record, the rows for each purpose, and what it rejects."""

import json

import pandas
import pytest
import torch

from coppice import data, models
from coppice.core import records
from coppice.core.errors import DataError, SettingsError
from coppice.stages import evaluate
from coppice.stages.evaluate import generation

SETTINGS = {
    "perplexity": {"datasets": ["wikitext2"], "protocol": "gptq-2048"},
    "zero_shot": {"tasks": ["piqa", "arc_easy"], "metric": {"arc_easy": "acc_norm"}, "limit": None},
    "engine": "prefix-tree",
    "batch_size": 4,
    "generation": {"prompts": []},
    "cost": {"enabled": False},
}


def piqa(count, start=5):
    words = [f"w{start + i % 90}" for i in range(count + 3)]
    return [
        {"goal": words[i], "sol1": f"{words[i + 1]} w6", "sol2": f"{words[i + 2]} w7 w8", "label": i % 2}
        for i in range(count)
    ]


def arc(count):
    choices = {"text": ["w5", "w6 w7", "w8 w9 w10"], "label": ["A", "B", "C"]}
    return [
        {"id": str(i), "question": f"w{10 + i % 80}", "choices": choices, "answerKey": "ABC"[i % 3]}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    text = [{"text": " ".join(f"w{3 + (i * j) % 120}" for j in range(50))} for i in range(20)]
    tables = {
        "wikitext2": {"report": text, "selection": text[:5]},
        "piqa": {"report": piqa(12), "selection": piqa(4, 40)},
        "arc_easy": {"report": arc(9), "selection": arc(3)},
    }
    for name, roles in tables.items():
        data.write(name, roles, folder / name, data.Origin(splits={"report": "test"}))
    return {name: str(folder / name / "dataset.json") for name in tables}


def evaluated(folder, datasets, output, settings=SETTINGS, **more):
    identity = {"model": "M", "config": None, "stage": "dense"}
    how = evaluate.Evaluate.model_validate(settings)
    evaluate.evaluate(evaluate.EvaluationRequest(identity, models.Source(str(folder)), how, datasets, output, **more))
    return records.read(output / "evaluation_results.json")


def test_the_record_has_both_accuracies_the_mean_of_the_chosen_ones_and_provenance(tiny_checkpoint, datasets, tmp_path):
    record = evaluated(tiny_checkpoint("llama"), datasets, tmp_path)
    task = record["zero_shot"]["arc_easy"]
    assert task["metric"] == "acc_norm" and task["value"] == task["acc_norm"] and "acc" in task
    assert record["average_acc"] == pytest.approx((record["zero_shot"]["piqa"]["acc"] + task["acc_norm"]) / 2)
    assert record["provenance"]["fingerprints"]["weights"] and record["provenance"]["versions"]["torch"]
    assert set(record["provenance"]["fingerprints"]["datasets"]) == {"wikitext2", "piqa", "arc_easy"}
    assert record["perplexity"]["wikitext2"]["protocol"]["split"] == "test"


def test_samples_hold_the_prediction_for_each_item(tiny_checkpoint, datasets, tmp_path):
    record = evaluated(tiny_checkpoint("mistral"), datasets, tmp_path)
    rows = pandas.read_parquet(tmp_path / "samples/arc_easy.parquet")
    assert (
        list(rows["doc_id"]) == list(range(9)) and rows["correct"].mean() == record["zero_shot"]["arc_easy"]["acc_norm"]
    )
    lengths = [len(text) for text in ("w5", "w6 w7", "w8 w9 w10")]
    picked = [max(range(3), key=lambda i, s=scores: s[i] / lengths[i]) for scores in rows["loglikelihoods"]]
    assert [str(p) for p in picked] == list(rows["prediction"])
    assert [p == int(t) for p, t in zip(picked, rows["target"], strict=True)] == [bool(c) for c in rows["correct"]]


def test_both_engines_give_the_same_result(tiny_checkpoint, datasets, tmp_path):
    folder = tiny_checkpoint("mistral")
    ours = evaluated(folder, datasets, tmp_path / "a")
    theirs = evaluated(folder, datasets, tmp_path / "b", SETTINGS | {"engine": "lm-eval"})
    assert ours["average_acc"] == theirs["average_acc"]
    for name in ("piqa", "arc_easy"):
        mine = pandas.read_parquet(tmp_path / "a/samples" / f"{name}.parquet")
        other = pandas.read_parquet(tmp_path / "b/samples" / f"{name}.parquet")
        assert list(mine["prediction"]) == list(other["prediction"])
        for left, right in zip(mine["loglikelihoods"], other["loglikelihoods"], strict=True):
            assert left == pytest.approx(right, abs=1e-3)


def test_the_record_says_why_the_harness_scored_instead_of_the_prefix_tree(tiny_checkpoint, datasets, tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    record = evaluated(tiny_checkpoint("llama", rope_parameters=rope), datasets, tmp_path)
    assert {task["engine"] for task in record["zero_shot"].values()} == {"lm-eval"}
    [warning] = record["warnings"]  # once, not once for each task
    assert "one text at a time" in warning
    assert "dynamic NTK" in warning
    assert evaluated(tiny_checkpoint("llama"), datasets, tmp_path / "other")["warnings"] == []


def test_selection_uses_the_selection_rows(tiny_checkpoint, datasets, tmp_path):
    record = evaluated(tiny_checkpoint("llama"), datasets, tmp_path, purpose="selection")
    assert (
        record["zero_shot"]["piqa"]["n"] == 4 and record["perplexity"]["wikitext2"]["protocol"]["split"] == "selection"
    )


def test_window_losses_add_up_to_the_perplexity(tiny_checkpoint, datasets, tmp_path):
    record = evaluated(tiny_checkpoint("llama"), datasets, tmp_path)
    windows = json.loads((tmp_path / "ppl_results.json").read_text())["perplexity"]["wikitext2"]["window_losses"]
    total = sum(window["nll_per_token"] * window["tokens"] for window in windows)
    assert total / sum(w["tokens"] for w in windows) == pytest.approx(
        record["perplexity"]["wikitext2"]["nll_per_token"]
    )


def test_writes_no_record_for_a_model_that_gives_nan(tiny_model, tiny_tokenizer, datasets, tmp_path):
    import torch

    from coppice.core.errors import CoppiceError

    model = tiny_model("llama")
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    model.save_pretrained(tmp_path / "broken")
    tiny_tokenizer.save_pretrained(tmp_path / "broken")
    with pytest.raises(CoppiceError, match=r"broken: .*wikitext2 is nan"):
        evaluated(tmp_path / "broken", datasets, tmp_path / "out")
    assert not (tmp_path / "out/evaluation_results.json").exists()


def test_names_a_metric_that_the_task_lacks(tiny_checkpoint, datasets, tmp_path):
    settings = SETTINGS | {"zero_shot": SETTINGS["zero_shot"] | {"metric": {"piqa": "f1"}}}
    with pytest.raises(SettingsError, match=r"metric\.piqa.*'f1'.*acc"):
        evaluated(tiny_checkpoint("llama"), datasets, tmp_path, settings)


def test_names_a_role_that_the_dataset_lacks(tiny_checkpoint, datasets, tmp_path):
    data.write("piqa", {"train": piqa(3)}, tmp_path / "piqa")
    with pytest.raises(DataError, match="piqa has no rows for report"):
        evaluated(tiny_checkpoint("llama"), datasets | {"piqa": str(tmp_path / "piqa/dataset.json")}, tmp_path / "out")


@pytest.mark.parametrize("form", ["none", "chat"])
def test_generates_the_likeliest_token_each_time(tiny_checkpoint, datasets, tmp_path, form):
    """Compares with a loop that runs the whole text for each token."""
    folder, question = tiny_checkpoint("mistral"), "w9 w8 w7"
    settings = SETTINGS | {"generation": {"prompts": [question, "w3 " * 300], "new_tokens": 5}}
    record = evaluated(folder, datasets, tmp_path, settings, prompt=form)
    model, tokenizer = models.load(models.Source(str(folder))), models.load_tokenizer(folder)
    question_text = f"{question}\n" if form == "none" else f"w4 {question} w5 "
    ids = [1] * (form == "none" and tokenizer(question_text).input_ids[0] == 1) + tokenizer(
        question_text, add_special_tokens=False
    ).input_ids
    start = len(ids)
    while len(ids) < start + 5 and ids[-1] != tokenizer.eos_token_id:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert record["generations"] == [
        {"prompt": question, "text": expected},
        {"prompt": "w3 " * 300, "text": None},  # longer than the model's context
    ]


def test_an_answer_ends_at_the_end_that_the_user_names(tiny_checkpoint):
    """The checkpoint itself knows nothing of `models.X.eos_token`, and would go on after it."""
    folder = str(tiny_checkpoint())

    def answer(**named):
        source = models.Source(folder, **named)
        found = generation.answers(models.load(source), source.tokenizer(), ["w5 w6 w7"], "none", 6)
        return found[0]["text"].split()

    whole = answer()
    end = next(word for word in whole[1:] if word != whole[0])
    assert answer(eos_token=end) == whole[: whole.index(end)]
