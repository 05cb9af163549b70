"""Datasets: any local form becomes roles with fingerprints; selection and report never share a row."""

import hashlib
import json

import pytest

from coppice import data
from coppice.core import records
from coppice.core.errors import CoppiceError, DataError


def entry(path, form="json", columns=None, **splits):
    return {"path": str(path), "format": form, "columns": columns or {}, "splits": splits}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_json_files_of_a_folder_are_matched_to_their_splits(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"t{i}"} for i in range(5)])
    write_jsonl(tmp_path / "test.jsonl", [{"text": "report"}])
    data.prepare("mine", entry(tmp_path, train="train", report="test"), tmp_path / "out", needs_selection=False)
    assert data.texts(tmp_path / "out/dataset.json", "report")[:] == ["report"]
    assert data.facts(tmp_path / "out/dataset.json", "train")["rows"] == 5


def test_text_rows_are_stripped_and_compressed_files_read(tmp_path):
    import gzip

    with gzip.open(tmp_path / "ptb.train.txt.gz", "wt") as file:
        file.write(" one \n two \n")
    (tmp_path / "ptb.test.txt").write_text(" three \n")
    data.prepare("ptb", entry(tmp_path, "text", train="train", report="test"), tmp_path / "out", needs_selection=False)
    assert data.texts(tmp_path / "out/dataset.json", "train")[:] == ["one", "two"]


def test_columns_are_mapped_to_their_canonical_names(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [{"sentence": "a"}])
    data.prepare("ptb", entry(tmp_path, columns={"text": "sentence"}, report="test"), tmp_path / "out", False)
    assert data.texts(tmp_path / "out/dataset.json", "report")[:] == ["a"]


@pytest.mark.parametrize("turned", [False, True])
def test_a_column_whose_name_another_one_takes_can_have_a_new_name_in_any_order(tmp_path, turned):
    """In one of the orders the instruction was the context, and the question was gone."""
    write_jsonl(tmp_path / "train.jsonl", [{"input": "question", "context": "context", "output": "o", "id": 1}])
    columns = [("instruction", "input"), ("input", "context"), ("output", "output")]
    mine = entry(tmp_path, train="train") | {"columns": dict(reversed(columns) if turned else columns)}
    data.prepare("mine", mine, tmp_path / "out", needs_selection=False)
    [row] = data.load(tmp_path / "out/dataset.json", "train")
    assert row == {"instruction": "question", "input": "context", "output": "o", "id": 1}
    with pytest.raises(DataError, match=r"columns\.prompt: 'id' is mapped twice"):
        data.prepare("mine", mine | {"columns": {"prompt": "id", "completion": "id"}}, tmp_path / "out", False)


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [{"goal": "a", "sol1": "b"}])
    with pytest.raises(DataError, match=r"piqa.*sol2.*goal, sol1"):
        data.prepare("piqa", entry(tmp_path, report="test"), tmp_path / "out", False, data.TASK_COLUMNS["piqa"])


def test_a_garbled_file_is_named(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match=r"test\.jsonl"):
        data.prepare("mine", entry(tmp_path, report="test"), tmp_path / "out", False)


def test_an_empty_split_is_an_error(tmp_path):
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(DataError, match=r"mine"):
        data.prepare("mine", entry(tmp_path, report="test"), tmp_path / "out", False)
    assert not (tmp_path / "out/dataset.json").exists()


def test_selection_is_a_sample_of_train_where_there_is_no_split_for_it(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"t{i}"} for i in range(1500)])
    write_jsonl(tmp_path / "validation.jsonl", [{"text": f"r{i}"} for i in range(9)])
    data.prepare("mine", entry(tmp_path, train="train", report="validation"), tmp_path / "out", needs_selection=True)
    chosen = data.texts(tmp_path / "out/dataset.json", "selection")[:]
    assert len(set(chosen)) == data.SELECTION_ROWS and all(text.startswith("t") for text in chosen)
    assert data.facts(tmp_path / "out/dataset.json", "report")["rows"] == 9


def test_selection_takes_a_fixed_part_of_the_report_where_nothing_else_exists_and_says_so(tmp_path):
    rows = [{"text": f"r{i}"} for i in range(500)]
    write_jsonl(tmp_path / "validation.jsonl", rows)
    record = tmp_path / "out/dataset.json"
    data.prepare("mine", entry(tmp_path, report="validation"), tmp_path / "out", needs_selection=True)
    report, selection = data.texts(record, "report")[:], data.texts(record, "selection")[:]
    assert not set(report) & set(selection) and len(report) + len(selection) == 500
    assert 60 < len(selection) < 140
    assert "leave out" in records.read(record)["notes"][0]
    data.prepare("mine", entry(tmp_path, report="validation"), tmp_path / "whole", needs_selection=False)
    assert data.facts(tmp_path / "whole/dataset.json", "report")["rows"] == 500


def test_the_fingerprint_is_of_the_rows_and_not_of_the_file(tmp_path):
    rows = [{"text": "a"}, {"text": "b"}]
    write_jsonl(tmp_path / "test.jsonl", rows)
    import pandas

    pandas.DataFrame(rows).to_csv(tmp_path / "test.csv", index=False)
    for form in ("json", "csv"):
        data.prepare("mine", entry(tmp_path, form, report="test"), tmp_path / form, False)
    prints = [data.facts(tmp_path / form / "dataset.json", "report")["fingerprint"] for form in ("json", "csv")]
    assert prints[0] == prints[1]


def test_words_that_libraries_take_for_nothing_are_text(tmp_path):
    (tmp_path / "train.csv").write_text("instruction,input,output\nsay,,None\nsay,x,NA\nsay,x,null\n")
    data.prepare("mine", entry(tmp_path, "csv", train="train"), tmp_path / "out", needs_selection=False)
    assert data.load(tmp_path / "out/dataset.json", "train")["output"][:] == ["None", "NA", "null"]


@pytest.mark.parametrize("rows", ["a,b,c\nd,e,f\n", "a,b,\nd,e,\n"])
def test_rows_with_more_cells_than_the_header_are_refused(tmp_path, rows):
    """All cells would move by a column: the response would be what is in the column behind it."""
    (tmp_path / "train.csv").write_text(f"instruction,output\n{rows}")
    with pytest.raises(DataError, match=r"train\.csv: rows have more cells.*Quote cells"):
        data.prepare("mine", entry(tmp_path, "csv", train="train"), tmp_path / "out", needs_selection=False)


def test_a_frame_that_was_written_with_its_rows_names_is_read(tmp_path):
    (tmp_path / "train.csv").write_text("instruction,output,__index_level_0__\na,b,7\n")
    data.prepare("mine", entry(tmp_path, "csv", train="train"), tmp_path / "out", needs_selection=False)
    assert data.load(tmp_path / "out/dataset.json", "train")["output"][:] == ["b"]


def test_the_mark_of_an_editor_is_no_text(tmp_path):
    (tmp_path / "test.txt").write_text("one\ntwo\n", encoding="utf-8-sig")
    data.prepare("mine", entry(tmp_path, "text", report="test"), tmp_path / "out", needs_selection=False)
    assert data.texts(tmp_path / "out/dataset.json", "report")[:] == ["one", "two"]


def boolq(*numbers):
    return [{"question": f"q{i}", "passage": "p", "label": i % 2} for i in numbers]


def prepared_boolq(folder, **splits):
    data.prepare("boolq", entry(folder, **splits), folder / "out", True, data.TASK_COLUMNS["boolq"])
    record = folder / "out/dataset.json"
    return {
        role: {row["question"] for row in data.load(record, role)} for role in records.read(record)["roles"]
    }, record


def test_rows_that_are_reported_are_never_chosen_by(tmp_path):
    write_jsonl(tmp_path / "validation.jsonl", boolq(*range(6)))
    write_jsonl(tmp_path / "test.jsonl", boolq(4, 5, 6))
    found, record = prepared_boolq(tmp_path, selection="validation", report="test")
    assert found == {"selection": {"q0", "q1", "q2", "q3"}, "report": {"q4", "q5", "q6"}}
    assert records.read(record)["notes"] == ["selection: 2 rows are left out that are report rows too"]
    write_jsonl(tmp_path / "validation.jsonl", boolq(4, 5))
    with pytest.raises(DataError, match=r"all selection rows are report rows.*splits\.selection"):
        prepared_boolq(tmp_path, selection="validation", report="test")


def test_rows_of_any_task_are_kept_apart_and_lines_of_a_text_are_not(tmp_path):
    for name in ("validation", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": ""}, {"text": name}])
    rows = {}
    for uses in ((), ("text",)):
        mine = entry(tmp_path, selection="validation", report="test") | {"uses": uses}
        data.prepare("mine", mine, tmp_path / "out", needs_selection=True)
        rows[uses] = data.facts(tmp_path / "out/dataset.json", "selection")["rows"]
    assert rows == {(): 1, ("text",): 2}


def test_a_file_that_is_changed_in_the_same_second_is_read_anew(tmp_path):
    """The library's own cache knows files by their name and time alone."""
    import os

    path = tmp_path / "test.jsonl"
    for text in ("one", "two"):
        write_jsonl(path, [{"text": text}])
        os.utime(path, (0, 0))
        data.prepare("mine", entry(tmp_path, report="test"), tmp_path / "out", needs_selection=False)
        assert data.texts(tmp_path / "out/dataset.json", "report")[:] == [text]
    assert not list((tmp_path / "out").glob(".partial*"))
    digests = records.read(tmp_path / "out/dataset.json")["provenance"]["fingerprints"]["files"]
    assert digests == {"test.jsonl": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.mark.parametrize("name", ["v[12]", "q?", "a*", "b[x]", "{a,b}"])
def test_marks_in_a_path_stand_for_themselves(tmp_path, name):
    for folder, text in ((name, "mine"), ("v1", "other"), ("qx", "other"), ("ab", "other"), ("bx", "other")):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "test.jsonl", [{"text": text}])
    data.prepare("mine", entry(tmp_path / name, report="test"), tmp_path / "out", needs_selection=False)
    assert data.texts(tmp_path / "out/dataset.json", "report")[:] == ["mine"]


def test_files_that_may_each_be_a_split_are_told_and_numbered_parts_belong_together(tmp_path):
    for name in ("test.json", "test.jsonl"):
        write_jsonl(tmp_path / name, [{"text": name}])
    with pytest.raises(CoppiceError, match=r"split 'test': test\.json, test\.jsonl"):
        data.prepare("mine", entry(tmp_path, report="test"), tmp_path / "out", needs_selection=False)
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"):
        write_jsonl(tmp_path / name, [{"text": name}])
    data.prepare("mine", entry(tmp_path, train="train"), tmp_path / "out", needs_selection=False)
    assert data.facts(tmp_path / "out/dataset.json", "train")["rows"] == 2


CHOICES = {"text": ["x", "y"], "label": ["A", "B"]}
ROWS = {
    "boolq": {"question": "q", "passage": "p", "label": 1},
    "piqa": {"goal": "g", "sol1": "a", "sol2": "b", "label": 0},
    "hellaswag": {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": "1"},
    "winogrande": {"sentence": "a _ b", "option1": "c", "option2": "d", "answer": "2"},
    "arc_easy": {"question": "q", "choices": CHOICES, "answerKey": "B"},
    "openbookqa": {"question_stem": "q", "choices": CHOICES, "answerKey": "A"},
}


@pytest.mark.parametrize(
    ("task", "column", "wrong"),
    [
        ("boolq", "label", -1),
        ("piqa", "label", -1),
        ("piqa", "label", "0"),
        ("hellaswag", "label", "2"),
        ("hellaswag", "label", ""),
        ("winogrande", "answer", ""),
        ("winogrande", "answer", 2),
        ("arc_easy", "answerKey", "b"),
        ("openbookqa", "choices", "x or y"),
    ],
)
def test_rows_without_a_right_answer_are_told_before_any_model_is_asked(tmp_path, task, column, wrong):
    """lm-eval counts each of them as answered wrongly: the public test split of PIQA would give an accuracy of 0."""
    write_jsonl(tmp_path / "test.jsonl", [ROWS[task] | {column: wrong}])
    with pytest.raises(DataError, match=rf"^datasets\.{task}: row 0 of its report rows \(from 0\): "):
        data.prepare(task, entry(tmp_path, report="test"), tmp_path / "out", False, data.TASK_COLUMNS[task])


def test_rows_with_right_answers_are_taken(tmp_path):
    for task, row in ROWS.items():
        write_jsonl(tmp_path / "test.jsonl", [row])
        data.prepare(task, entry(tmp_path, report="test"), tmp_path / "out", False, data.TASK_COLUMNS[task])
