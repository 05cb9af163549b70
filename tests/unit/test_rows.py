"""Rows with several right answers: what is trained on, what is asked, and which rows are refused."""

import pytest
from datasets import Dataset

from coppice.core.errors import DataError
from coppice.data import prompts, row_checks
from coppice.models.kinds import Decoding


class Plain:
    """A tokenizer without a chat template."""

    chat_template = None


def formatter(kind: str) -> prompts.Formatter:
    return prompts.Formatter(kind, "alpaca", Plain())


def texts(row) -> list[tuple[str, bool]]:
    return [(segment.text, segment.learned) for segment in row.segments]


def test_columns_decide_the_kind_of_rows_with_one_answer_or_several():
    accepted = ("pair", "caption", "completion")
    assert prompts.kind_of(["id", "input", "targets"], "d", accepted) == "pair"
    assert prompts.kind_of(["input", "target"], "d", accepted) == "pair"
    assert prompts.kind_of(["prompt", "captions"], "d", accepted) == "caption"
    assert prompts.kind_of(["prompt", "completion"], "d", accepted) == "completion"
    with pytest.raises(DataError, match=r"input and target \| targets \(pair\).* but have src, target.*columns"):
        prompts.kind_of(["src", "target"], "d", accepted)


def test_trains_on_every_answer_of_a_row_and_asks_for_all_of_them_once():
    content = {"prompt": "detections: cat", "caption": "a cat", "captions": ["a cat", "one cat", " "]}
    form = formatter("caption")
    assert [texts(row) for row in form.rows(content, "row 0")] == [
        [("detections: cat", False), ("a cat", True)],
        [("detections: cat", False), ("one cat", True)],
    ]
    asked = form.question(content, "row 0")
    assert (asked.question, asked.references) == ("detections: cat", ("a cat", "one cat"))
    assert asked.content is content


def test_reads_the_question_and_the_answer_of_rows_of_every_kind():
    instruction = formatter("instruction").question({"instruction": "Add.", "input": "1 2", "output": "3"}, "row 0")
    assert instruction.question.endswith("### Input:\n1 2\n\n### Response:\n")
    assert instruction.references == ("3",)
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    assert formatter("chat").question({"messages": turns}, "row 0").references == ("Hi",)


def test_refuses_to_ask_a_row_that_has_no_answer():
    with pytest.raises(DataError, match="row 3: has no answer"):
        formatter("pair").question({"input": "x", "target": None}, "data set d, row 3")
    with pytest.raises(DataError, match=r"row 4: cannot be read as a row of kind 'pair'.*Correct the row"):
        formatter("pair").rows({"input": "x", "target": 7}, "data set d, row 4")


@pytest.mark.parametrize("empty", [{"captions": []}, {"captions": ["a cat", ""]}, {"captions": None}])
def test_names_the_row_whose_caption_is_empty(empty):
    table = Dataset.from_list([{"prompt": "p", "captions": ["a dog"]}, {"prompt": "q", **empty}])
    with pytest.raises(DataError, match=r"datasets\.d: row 1 of its train rows \(from 0\) has an empty captions"):
        row_checks.check_columns("d", table, "train", ["training"], [])


def test_names_the_row_that_has_nothing_to_compare_an_answer_with():
    table = Dataset.from_list([{"prompt": "p", "completion": "a"}, {"prompt": "q", "completion": " "}])
    with pytest.raises(DataError, match=r"datasets\.d: row 1 of its report rows \(from 0\) has an empty completion"):
        row_checks.check_columns("d", table, "report", ["answers"], [])
    row_checks.check_columns("d", table, "train", ["training", "answers"], [])


def test_names_the_column_that_does_not_hold_text():
    table = Dataset.from_list([{"input": "p", "targets": [1, 2]}])
    with pytest.raises(DataError, match="column targets holds int64, but must hold text"):
        row_checks.check_columns("d", table, "train", ["training"], [])


def test_an_answer_ends_before_the_first_stop_text():
    assert Decoding(stop=("\n", "#")).cut("a # b\nc") == "a"
    assert Decoding(stop=("\n",)).cut("a") == "a"
    assert Decoding().cut("a b") == "a b"
