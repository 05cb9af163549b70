"""Answers whose first token merges with the end of their prompt: an error, items left out, or scored as a whole."""

import pytest
import torch
from lm_eval.api.instance import Instance

from coppice import data
from coppice.core.errors import DataError
from coppice.stages.evaluate import zero_shot
from coppice.study.settings.sections.evaluate import ZeroShot

TASK = """
task: joined
dataset_path: nowhere
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
# "ab" is one token: the prompt "x a" and the answer "b" have none of their own between them; "bc" keeps "c".
ITEMS = [
    {"question": "x a", "choices": [" c", " x"], "answer": 0},
    {"question": "x a", "choices": ["b", "c"], "answer": 0},
    {"question": "c a", "choices": ["bc", "cc"], "answer": 1},
    {"question": "c x", "choices": ["b", "c"], "answer": 1},
]


@pytest.fixture(scope="module")
def tokenizer():
    """Return a tokenizer with one token per character, except for "ab"."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "</s>": 1, " ": 2, "a": 3, "b": 4, "c": 5, "x": 6, "ab": 7}
    pieces = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    return PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>", eos_token="</s>", pad_token="<s>")


@pytest.fixture(params=["prefix-tree", "lm-eval"])
def lm(request, tiny_model, tokenizer):
    return zero_shot.language_model(tiny_model("llama"), tokenizer, request.param, 2)


@pytest.fixture
def measured(lm, tmp_path):
    """Return `measure(items, policy)`, which scores items of the task `joined`."""
    (tmp_path / "joined.yaml").write_text(TASK)

    def measure(items, policy):
        data.write("joined", {"report": items}, tmp_path / policy)
        choice = ZeroShot(include_path=str(tmp_path), on_merged_tokens=policy)
        return zero_shot.measure(lm, "joined", tmp_path / policy / "dataset.json", "report", choice)

    return measure


def log_likelihood(model, given, answer):
    """Return the log-likelihood of the tokens `answer` after the tokens `given`, from plain logits."""
    with torch.no_grad():
        scores = model(torch.tensor([[*given, *answer]])).logits[0, len(given) - 1 : -1].log_softmax(-1)
    return float(scores.gather(1, torch.tensor(answer)[:, None]).sum())


def test_an_error_names_the_item_both_texts_the_cause_and_the_remedy(measured):
    with pytest.raises(DataError, match="task joined, item 1 ") as found:
        measured(ITEMS, "error")
    for word in ("'x a'", "'b'", "merges", "target_delimiter", "on_merged_tokens", "drop", "score-whole"):
        assert word in str(found.value)


def test_items_are_left_out_and_counted(measured):
    facts, rows = measured(ITEMS, "drop")
    assert [row["doc_id"] for row in rows] == [0, 3]
    assert (facts["n"], facts["merged_items"]) == (2, 2)
    assert facts["warnings"][0].startswith("joined: in 2 of 4 items")
    assert "left out" in facts["warnings"][0]
    result, samples, _ = zero_shot.result("joined", facts, rows)
    assert (result["n"], result["merged_items"], len(samples)) == (2, 2, 2)


def test_answers_are_scored_from_the_merged_token_on(measured, lm):
    facts, rows = measured(ITEMS, "score-whole")
    assert (facts["n"], facts["merged_items"]) == (4, 2)
    assert "scored from that token on" in facts["warnings"][0]
    given = [6, 2]  # "x "; both answers of the item begin at the same token
    expected = [log_likelihood(lm.model, given, answer) for answer in ([7], [3, 5])]
    assert rows[1]["loglikelihoods"] == pytest.approx(expected, abs=1e-4)
    expected = [log_likelihood(lm.model, [5, 2, 6], answer) for answer in ([4], [5])]
    assert rows[3]["loglikelihoods"] == pytest.approx(expected, abs=1e-4)  # nothing merges there


def test_an_answer_is_scored_without_its_first_characters_as_in_lm_eval_and_this_is_said(measured, lm):
    facts, rows = measured([ITEMS[0], ITEMS[2]], "error")
    assert facts["merged_items"] == 1
    assert "without its first characters" in facts["warnings"][0]
    assert rows[1]["loglikelihoods"][0] == pytest.approx(log_likelihood(lm.model, [5, 2, 3], [5]), abs=1e-4)


def test_no_item_is_left(measured):
    with pytest.raises(DataError, match="drop leaves no item"):
        measured(ITEMS[1:3], "drop")


def test_nothing_merges(measured):
    facts, _ = measured([ITEMS[0], ITEMS[3]], "error")
    assert (facts["merged_items"], facts["warnings"]) == (0, [])


def test_an_empty_answer_is_another_error(lm):
    with pytest.raises(DataError, match="no tokens after its context"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("x a", ""), 0)])
