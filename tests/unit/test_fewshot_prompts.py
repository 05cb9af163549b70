"""Prompts of the seven default tasks are lm-eval's own, word for word, with any number of examples.

The expected prompts come from lm-eval's task objects, built from its untouched definitions with only
`datasets.load_dataset` replaced.
"""

import copy
import json
import os
from pathlib import Path

import datasets
import pytest

from coppice import data
from coppice.data import task_definitions
from coppice.stages.evaluate import zero_shot
from coppice.study.settings.registry import TASKS
from coppice.study.settings.sections.evaluate import ZeroShot

REALDATA = Path(os.environ.get("COPPICE_REALDATA", Path(__file__).parents[3] / "shared/realdata"))
TESTED = ("arc_easy", "arc_challenge", "openbookqa")  # lm-eval scores their test split; the others' is unlabeled
SHOTS = [0, 1, 3, 5]


def letters(task, i):
    choices = {"text": [f"{task} answer {i} {letter}" for letter in "abcd"], "label": list("ABCD")}
    return {"id": f"{task}-{i}", "choices": choices, "answerKey": "ABCD"[i % 4]}


def row(task, i):
    """Return row `i` of a task, with the columns of its official data set."""
    if task == "boolq":
        return {"question": f"is {i} even", "passage": f"Passage {i}.", "idx": i, "label": int(i % 2 == 0)}
    if task == "piqa":
        return {"goal": f"Reach goal {i}", "sol1": f"go {i}", "sol2": f"stay {i}", "label": i % 2}
    if task == "hellaswag":
        endings = [f"does {verb} {i}." for verb in ("run", "sit", "[title] walk", "jump")]
        parts = {"ctx_a": f"A man [step] is at {i}.", "ctx_b": "he", "ctx": f"A man [step] is at {i}. he"}
        return {"ind": i, "activity_label": f"Sport {i % 3}", "endings": endings, "label": str(i % 4)} | parts
    if task == "winogrande":
        sentence = f"Ann gave Bea {i} books because _ liked them."
        return {"sentence": sentence, "option1": f"Ann {i}", "option2": f"Bea {i}", "answer": str(1 + i % 2)}
    question = "question_stem" if task == "openbookqa" else "question"
    return {question: f"Which one is {i}?"} | letters(task, i)


def small(task):
    """Return 40 rows to draw from, one of which is there twice, and 12 rows to score."""
    return [row(task, i) for i in (*range(39), 0)], [row(task, i) for i in range(100, 112)]


def real(task):
    """Return 300 real rows to draw from and 60 to score."""
    split = "validation" if task not in TESTED else "test"
    lines = (REALDATA / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:360]]
    return rows[:300], rows[300:]


def asked(lm, monkeypatch, call):
    """Return the (context, continuation) pairs that `call` asks `lm` to score; each is answered by a constant."""
    found = []

    def answer(requests):
        found.extend(request.args for request in requests)
        return [(-1.0, False)] * len(requests)

    with monkeypatch.context() as patch:
        patch.setattr(lm, "loglikelihood", answer)
        call()
    return found


def official(lm, task, train, scored, shots, chat, seed):
    """Score a task by lm-eval alone, as its `simple_evaluate` does."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate

    splits = {"train": train, "test" if task in TESTED else "validation": scored}
    loaded = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda **_: loaded)
        built = ConfigurableTask(config=copy.deepcopy(task_definitions.definition(task)))
    built.set_config("num_fewshot", shots)
    built.set_fewshot_seed(seed)
    evaluate(lm, {"tasks": {task: built}}, apply_chat_template=chat, fewshot_as_multiturn=True, bootstrap_iters=0)


@pytest.fixture(scope="module")
def lm(tiny_model, tiny_tokenizer):
    return zero_shot.language_model(tiny_model("llama"), tiny_tokenizer, "prefix-tree", 4)


def check_equal(lm, monkeypatch, folder, task, train, scored):
    data.write(task, {"train": train, "report": scored}, folder)
    for shots in SHOTS:
        for chat in (False, True):
            choice = ZeroShot(num_fewshot=shots, chat_template=chat)
            ours = asked(
                lm,
                monkeypatch,
                lambda choice=choice: zero_shot.measure(lm, task, folder / "dataset.json", "report", choice, seed=7),
            )
            theirs = asked(
                lm,
                monkeypatch,
                lambda shots=shots, chat=chat: official(lm, task, train, scored, shots, chat, seed=7),
            )
            assert ours == theirs and len(ours) >= 2 * len(scored), (shots, chat)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_those_of_lm_eval(lm, monkeypatch, tmp_path, task):
    check_equal(lm, monkeypatch, tmp_path, task, *small(task))


@pytest.mark.skipif(not REALDATA.is_dir(), reason=f"no real data at {REALDATA} (set COPPICE_REALDATA)")
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.slow
def test_prompts_of_real_rows_are_those_of_lm_eval(lm, monkeypatch, tmp_path, task):
    check_equal(lm, monkeypatch, tmp_path, task, *real(task))
