"""The miniature world is reproducible, has the schemas of the official datasets, and does not leak held-out items."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from coppice.miniature import DATASETS, build_world

# the columns that lm-eval's task definitions and the alpaca prompts read in the datasets on the hub
FIELDS = {
    "wikitext2": {"text"},
    "ptb": {"sentence"},
    "pretraining": {"text"},
    "alpaca": {"instruction", "input", "output"},
    "boolq": {"question", "passage", "idx", "label"},
    "piqa": {"goal", "sol1", "sol2", "label"},
    "hellaswag": {
        "ind",
        "activity_label",
        "ctx_a",
        "ctx_b",
        "ctx",
        "endings",
        "source_id",
        "split",
        "split_type",
        "label",
    },
    "winogrande": {"sentence", "option1", "option2", "answer"},
    "arc_easy": {"id", "question", "choices", "answerKey"},
    "arc_challenge": {"id", "question", "choices", "answerKey"},
    "openbookqa": {"id", "question_stem", "choices", "answerKey"},
}
TASKS = [name for name, roles in DATASETS.items() if "report" in roles and name not in ("wikitext2", "ptb")]
HELD_OUT = ("selection", "report")


@pytest.fixture(scope="module")
def valley(tmp_path_factory):
    folder = tmp_path_factory.mktemp("valley")
    return folder, build_world(folder, seed=7)


def rows(folder: Path, dataset: str, role: str) -> list[dict]:
    return [json.loads(line) for line in (folder / dataset / f"{role}.jsonl").read_text(encoding="utf-8").splitlines()]


def right_choice(task: str, row: dict) -> tuple[str, str]:
    """Return (context, right answer) of a row, by code written from lm-eval's YAML files and not from the package."""
    if task == "boolq":
        return f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"][row["label"]]
    if task == "piqa":
        return f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]][row["label"]]
    if task == "hellaswag":
        ending = row["endings"][int(row["label"])]
        return f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}", ending
    if task == "winogrande":
        start, end = row["sentence"].split("_")
        return start + row["option" + row["answer"]], end.strip()
    answer = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
    return (row["question_stem"], answer) if task == "openbookqa" else (f"Question: {row['question']}\nAnswer:", answer)


def words(text: str) -> str:
    """Return lower-case words between single spaces, so that a substring search ignores case and punctuation."""
    return " " + " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split()) + " "


def training_texts(folder: Path):
    for dataset, roles in DATASETS.items():
        if "train" not in roles:
            continue
        for row in rows(folder, dataset, "train"):
            if dataset in TASKS:
                yield " ".join(right_choice(dataset, row))
            elif dataset == "alpaca":
                yield f"{row['instruction']}\n{row['input']}\n{row['output']}"
            else:
                yield row["sentence" if dataset == "ptb" else "text"]


def test_every_dataset_has_its_roles_and_enough_rows(valley):
    folder, summary = valley
    assert set(summary) == set(DATASETS) == set(FIELDS)
    for dataset, roles in DATASETS.items():
        assert set(summary[dataset]) == set(roles)
        for role in roles:
            assert len(rows(folder, dataset, role)) == summary[dataset][role] > 0
    assert all(summary[task]["report"] >= 300 and summary[task]["selection"] >= 150 for task in TASKS)
    assert summary["alpaca"]["train"] >= 4000


def test_every_row_has_the_fields_of_the_official_dataset(valley):
    folder, _ = valley
    for dataset, roles in DATASETS.items():
        for role in roles:
            assert all(set(row) == FIELDS[dataset] for row in rows(folder, dataset, role)), (dataset, role)


@pytest.mark.parametrize("task", TASKS)
def test_the_right_answers_are_spread_evenly_and_the_choices_differ(valley, task):
    folder, _ = valley
    for role in HELD_OUT:
        items = rows(folder, task, role)
        places = Counter(str(row.get("label", row.get("answer", row.get("answerKey")))) for row in items)
        assert max(places.values()) - min(places.values()) <= 1, places
        assert len(places) == (4 if task in ("hellaswag", "arc_easy", "arc_challenge", "openbookqa") else 2)
        for row in items:
            choices = row.get("endings") or row.get("choices", {}).get("text") or list(row.values())[1:3]
            assert len(set(choices)) == len(choices)


@pytest.mark.parametrize("task", TASKS)
def test_no_item_occurs_twice_in_any_role(valley, task):
    folder, _ = valley
    items = [right_choice(task, row) for role in DATASETS[task] for row in rows(folder, task, role)]
    assert len(set(items)) == len(items)


def test_no_training_text_contains_a_held_out_item_or_document(valley):
    folder, _ = valley
    held_out = {
        words(" ".join(right_choice(t, row))) for t in TASKS for role in HELD_OUT for row in rows(folder, t, role)
    }
    held_out |= {words(row["sentence"]) for role in HELD_OUT for row in rows(folder, "ptb", role)}
    paragraphs = {words(row["text"]) for role in HELD_OUT for row in rows(folder, "wikitext2", role)}
    held_out |= {text for text in paragraphs if len(text.split()) > 5}
    # A held-out text can only begin where its first words are: look these up first, then compare the rest.
    starts = {}
    for text in held_out:
        starts.setdefault(tuple(text.split()[:5]), []).append(text)
    leaked = []
    for text in map(words, training_texts(folder)):
        tokens = text.split()
        for i in range(len(tokens) - 4):
            leaked += [held for held in starts.get(tuple(tokens[i : i + 5]), ()) if held in text]
    assert not leaked, leaked[:3]


def test_the_held_out_index_finds_a_copy_despite_case_and_punctuation():
    from coppice.miniature.leakage import HeldOut

    index = HeldOut(["Question: Mira saw a fox. What does a fox eat?\nAnswer: rabbits"])
    assert index.inside("One day mira saw a fox ; what does a fox eat ? Rabbits !")
    assert not index.inside("Mira saw a fox. What does a fox eat? Grain")
    assert not index.inside("Mira saw a fox. What does a fox eat?")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_in_another_process(valley, tmp_path):
    folder, _ = valley
    program = "import sys; from pathlib import Path; from coppice.miniature import build_world;"
    program += "build_world(Path(sys.argv[1]), seed=7); assert 'torch' not in sys.modules"
    env = {**os.environ, "PYTHONHASHSEED": "3", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env=env)
    for dataset, roles in DATASETS.items():
        for role in roles:
            name = f"{dataset}/{role}.jsonl"
            assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_another_seed_gives_another_world(valley, tmp_path):
    folder, _ = valley
    build_world(tmp_path, seed=8)
    assert (folder / "boolq/report.jsonl").read_bytes() != (tmp_path / "boolq/report.jsonl").read_bytes()
