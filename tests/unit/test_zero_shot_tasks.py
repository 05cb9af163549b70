"""Tasks of lm-eval: a user's own definitions, few-shot prompts, chat templates, and what is rejected."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from coppice import data, models
from coppice.core import records
from coppice.core.errors import DataError, SettingsError
from coppice.stages import evaluate
from coppice.stages.evaluate import zero_shot
from coppice.study.settings.sections.evaluate import ZeroShot

CHOICE = """
task: {name}
dataset_path: nowhere
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "w100 {{{{question}}}} w101"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
metadata: {{version: 3.5}}
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
"""
GENERATION = """
task: generated
dataset_path: nowhere
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["w3"], max_gen_toks: 3, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - {name: first, filter: [{function: take_first}]}
  - {name: again, filter: [{function: take_first}]}
"""
ROLLING = """
task: rolled
dataset_path: nowhere
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""


def rows(start, count):
    return [
        {"question": f"w{start + i} w{4 + i}", "choices": [f"w{20 + i}", f"w{30 + i} w9"], "answer": i % 2}
        for i in range(count)
    ]


@pytest.fixture
def folder(tmp_path):
    """Return a folder of task definitions, one of which has the name of an official task."""
    place = tmp_path / "definitions/deeper"
    place.mkdir(parents=True)
    (place / "mine.yaml").write_text(CHOICE.format(name="mine"))
    (place / "piqa.yaml").write_text(CHOICE.format(name="piqa"))
    (place / "generated.yaml").write_text(GENERATION)
    (place / "rolled.yaml").write_text(ROLLING)
    (place / "coded.yaml").write_text(CHOICE.format(name="coded") + "process_docs: !function code.same\n")
    (place / "code.py").write_text("def same(rows):\n    return rows\n")
    (place / "group.yaml").write_text("group: all_mine\ntask: [mine, coded]\ntag:\n  - some_tag\n")
    return str(tmp_path / "definitions")


@pytest.fixture
def record(tmp_path):
    """Return a prepared dataset whose train rows are questions from w10 on, and whose report rows from w60 on."""
    data.write("mine", {"train": rows(10, 6), "selection": rows(40, 4), "report": rows(60, 8)}, tmp_path / "d")
    return tmp_path / "d/dataset.json"


@pytest.fixture(scope="module")
def lm(tiny_model, tiny_tokenizer):
    return zero_shot.language_model(tiny_model("llama"), tiny_tokenizer, "prefix-tree", 4)


def prompts(lm, monkeypatch, *arguments):
    """Return the contexts that `measure` passes to the language model, and its facts."""
    asked = []
    original = lm.loglikelihood
    with monkeypatch.context() as patch:
        patch.setattr(lm, "loglikelihood", lambda requests: asked.extend(requests) or original(requests))
        facts, _ = zero_shot.measure(lm, *arguments)
    return [request.args[0] for request in asked], facts


def test_scores_a_users_task_even_if_it_has_the_name_of_an_official_one(lm, folder, record):
    for name in ("mine", "piqa"):
        facts, items = zero_shot.measure(lm, name, record, "report", ZeroShot(include_path=folder))
        result, samples, is_accuracy = zero_shot.result(name, facts, items)
        assert (result["metric"], result["version"], result["n"], is_accuracy) == ("acc", 3.5, 8, True)
        assert {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"} <= result.keys()
        assert sum(row["correct"] for row in samples) / 8 == result["value"]


@pytest.mark.parametrize("answer", [-1, 2, "w9", 1.0, None])
def test_rejects_an_item_whose_answer_is_not_a_choice_before_scoring(lm, folder, tmp_path, answer):
    asked = [row | {"answer": answer} for row in rows(60, 1)]
    data.write("mine", {"report": asked}, tmp_path / "d")
    with pytest.raises(DataError, match=r"^dataset mine: (item 0 \(from 0\)|its rows do not fit)"):
        zero_shot.measure(lm, "mine", tmp_path / "d/dataset.json", "report", ZeroShot(include_path=folder))


def test_few_shot_examples_come_from_the_train_rows(lm, folder, record, monkeypatch):
    contexts, facts = prompts(lm, monkeypatch, "mine", record, "report", ZeroShot(include_path=folder, num_fewshot=2))
    assert facts["num_fewshot"] == 2
    train = {row["question"] for row in rows(10, 6)}
    for context in contexts:
        *examples, asked = [part.split(" w101")[0].removeprefix("w100 ") for part in context.split("\n\n")]
        assert len(examples) == 2 and set(examples) <= train and asked not in train
    again, _ = prompts(lm, monkeypatch, "mine", record, "report", ZeroShot(include_path=folder, num_fewshot=2))
    other, _ = prompts(lm, monkeypatch, "mine", record, "report", ZeroShot(include_path=folder, num_fewshot=2), 1)
    assert contexts == again != other


def test_a_scored_row_is_never_a_few_shot_example(lm, folder, tmp_path, monkeypatch):
    data.write("mine", {"train": rows(10, 9), "selection": rows(10, 6)}, tmp_path / "d")
    record = tmp_path / "d/dataset.json"
    contexts, _ = prompts(lm, monkeypatch, "mine", record, "selection", ZeroShot(include_path=folder, num_fewshot=3))
    asked = {row["question"] for row in rows(10, 6)}
    for context in contexts:
        assert not asked & {part.split(" w101")[0].removeprefix("w100 ") for part in context.split("\n\n")[:-1]}
    with pytest.raises(DataError, match="0 of 6 train rows are not scored too"):
        data.write("mine", {"train": rows(10, 6), "report": rows(10, 6)}, tmp_path / "e")
        zero_shot.task("mine", tmp_path / "e/dataset.json", "report", ZeroShot(include_path=folder, num_fewshot=1))


def test_rejects_few_shot_examples_without_train_rows(folder, tmp_path):
    data.write("mine", {"report": rows(10, 6)}, tmp_path / "d")
    with pytest.raises(DataError, match="mine has no rows for train"):
        zero_shot.task("mine", tmp_path / "d/dataset.json", "report", ZeroShot(include_path=folder, num_fewshot=1))


def test_uses_the_chat_template_if_there_is_one_and_records_it(lm, folder, record, monkeypatch):
    choice = ZeroShot(include_path=folder, num_fewshot=1, chat_template=True)
    contexts, facts = prompts(lm, monkeypatch, "mine", record, "report", choice)
    assert facts["chat_template"] and all(c.startswith("w4 w100 ") and c.count(" w5 w4 ") == 2 for c in contexts)
    monkeypatch.setattr(lm.tokenizer, "chat_template", None)
    contexts, facts = prompts(lm, monkeypatch, "mine", record, "report", choice)
    assert not facts["chat_template"] and all(c.startswith("w100 ") for c in contexts)


def test_scores_a_task_that_generates_by_its_first_filter(lm, folder, record):
    facts, items = zero_shot.measure(lm, "generated", record, "report", ZeroShot(include_path=folder))
    result, samples, is_accuracy = zero_shot.result("generated", facts, items)
    assert (result["metric"], len(samples), is_accuracy) == ("exact_match", 8, True)
    for row, item in zip(samples, rows(60, 8), strict=True):
        assert row["target"] == item["choices"][item["answer"]] and len(row["prediction"].split()) <= 3
        assert row["correct"] == (row["prediction"] == row["target"])


def test_a_task_of_whole_texts_agrees_with_a_loop_and_is_not_an_accuracy(lm, folder, record):
    import torch

    facts, items = zero_shot.measure(lm, "rolled", record, "report", ZeroShot(include_path=folder))
    result, samples, is_accuracy = zero_shot.result("rolled", facts, items)
    assert result["metric"] == "word_perplexity" and not is_accuracy and len(samples) == 8
    total = 0.0
    for row, item in zip(samples, rows(60, 8), strict=True):
        ids = torch.tensor([[lm.prefix_token_id, *lm.tokenizer.encode(item["question"])]])
        logits = lm.model(ids).logits[0].double().log_softmax(-1)
        expected = sum(logits[i, ids[0, i + 1]].item() for i in range(ids.shape[1] - 1))
        assert row["loglikelihoods"] == [pytest.approx(expected, abs=1e-4)]
        total += expected
    assert torch.tensor(result["value"]).log() == pytest.approx(-total / 16, abs=1e-4)


def test_a_metric_that_is_not_an_accuracy_does_not_enter_the_average(tiny_checkpoint, folder, record, tmp_path):
    settings = {
        "perplexity": {"datasets": [], "protocol": "gptq-2048"},
        "zero_shot": {"tasks": ["mine", "rolled"], "metric": {}, "limit": None, "include_path": folder},
        "generation": {"prompts": []},
        "cost": {"enabled": False},
    }
    settings = evaluate.Evaluate.model_validate(settings)
    source, output = models.Source(str(tiny_checkpoint("llama"))), tmp_path / "out"
    identity = {"model": "M", "config": None, "stage": "dense"}
    evaluate.evaluate(
        evaluate.EvaluationRequest(identity, source, settings, {"mine": str(record), "rolled": str(record)}, output)
    )
    result = records.read(output / "evaluation_results.json")
    assert list(result["zero_shot"]) == ["mine"] and list(result["other_tasks"]) == ["rolled"]
    assert result["average_acc"] == result["zero_shot"]["mine"]["value"]
    assert (output / "samples/rolled.parquet").is_file()


@pytest.mark.parametrize("name", ["all_mine", "some_tag", "mmlu", "ai2_arc"])
def test_rejects_a_group_of_tasks(folder, name):
    with pytest.raises(SettingsError, match=f"'{name}' is a group of tasks"):
        zero_shot.facts(name, folder)


@pytest.mark.parametrize(("name", "reason"), [("humaneval", "runs the code"), ("squadv2", "is a Python class")])
def test_rejects_a_task_that_cannot_be_scored_and_says_why(name, reason):
    with pytest.raises(SettingsError, match=f"'{name}' {reason}"):
        zero_shot.facts(name)


def test_a_task_without_a_dataset_entry_uses_its_own_data(folder, tmp_path):
    import json
    from pathlib import Path

    from coppice.data import fetching

    for name, start in (("train", 10), ("test", 60)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(start, 5)))
    files = f"{{data_files: {{train: {tmp_path}/train.jsonl, test: {tmp_path}/test.jsonl}}}}"
    definition = CHOICE.format(name="local").replace(
        "dataset_path: nowhere", f"dataset_path: json\ndataset_kwargs: {files}"
    )
    (Path(folder) / "deeper/local.yaml").write_text(definition)
    fetching.fetch_dataset("local", None, False, tmp_path / "out/dataset.json", folder)
    found = {role: data.load(tmp_path / "out/dataset.json", role)["question"] for role in ("train", "report")}
    assert found == {
        "train": [row["question"] for row in rows(10, 5)],
        "report": [row["question"] for row in rows(60, 5)],
    }


def test_suggests_the_nearest_name_for_a_mistyped_task(folder):
    with pytest.raises(SettingsError, match="no task 'min'; did you mean 'mine'"):
        zero_shot.facts("min", folder)


def test_the_digest_of_a_definition_depends_on_its_text_and_code_not_on_its_folder(folder, tmp_path):
    import shutil

    before = zero_shot.facts("coded", folder)
    assert before["version"] == 3.5
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert zero_shot.facts("coded", str(moved)) == before
    (moved / "deeper/code.py").write_text("def same(rows):\n    return rows.select([0])\n")
    assert zero_shot.facts("coded", str(moved))["definition"] != before["definition"]
    (Path(folder) / "deeper/coded.yaml").write_text(CHOICE.format(name="coded").replace("w100", "w102"))
    assert zero_shot.facts("coded", folder)["definition"] != before["definition"]


def test_the_digest_of_a_definition_with_code_depends_on_the_files_that_it_may_read(folder):
    """The digest identifies a part of an evaluation.

    Without this, the old part would be reused after a change of a module that the code imports.
    """
    place = Path(folder) / "deeper"
    (place / "other.yaml").write_text("task: other")
    digests = [[zero_shot.facts(name, folder)["definition"] for name in ("coded", "mine")]]
    for name, text in (
        ("helper.py", ""),
        ("prompts.yaml", "- a"),
        ("other.yaml", "task: other\n# a word"),
        (".hidden", ""),
    ):
        (place / name).write_text(text)
        digests.append([zero_shot.facts(task, folder)["definition"] for task in ("coded", "mine")])
    coded, plain = zip(*digests, strict=True)
    assert len(set(coded[:3])) == 3 and len(set(coded[2:])) == 1
    assert len(set(plain)) == 1


def test_the_official_definitions_have_different_digests():
    from coppice.study.settings.registry import OFFICIAL

    facts = {name: zero_shot.facts(name) for name in OFFICIAL}
    assert len({fact["definition"] for fact in facts.values()}) == len(OFFICIAL)
    assert facts["boolq"]["version"] == 2.0 and facts["piqa"]["version"] == 1.0


@pytest.mark.slow
def test_the_command_line_of_lm_eval_scores_with_the_coppice_model(tiny_checkpoint, tmp_path):
    """With a user's task from a folder, `coppice lm-eval` gives what lm-eval's own backend gives."""
    rows = [{"q": f"w{5 + i} w9", "c": [f"w{20 + i}", f"w{40 + i} w7"], "a": i % 2} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "custom.yaml").write_text(
        "task: custom\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        'output_type: multiple_choice\ntest_split: test\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{c}}"\n'
        'doc_to_target: "{{a}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n'
    )
    found = {}
    for model in ("coppice", "hf"):
        asked = ["--model", model, "--model_args", f"pretrained={tiny_checkpoint('llama')}", "--tasks", "custom"]
        asked += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / model)]
        command = [sys.executable, "-m", "coppice", "lm-eval", *asked]
        subprocess.run(command, check=True, capture_output=True, timeout=900)
        [file] = (tmp_path / model).rglob("results_*.json")
        found[model] = json.loads(file.read_text())["results"]["custom"]
    timed = ("alias", "name", "sample_len", "sample_count")
    kept = [{key: value for key, value in found[model].items() if key not in timed} for model in found]
    assert kept[0] == kept[1] and "acc_norm,none" in kept[0]
