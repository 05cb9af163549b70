"""Datasets: local data of any form becomes roles with fingerprints; selection and report never share a row."""

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


def test_matches_json_files_of_a_folder_to_their_splits(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"t{i}"} for i in range(5)])
    write_jsonl(tmp_path / "test.jsonl", [{"text": "report"}])
    data.prepare("mine", entry(tmp_path, train="train", report="test"), tmp_path / "out", needs_selection=False)
    assert data.texts(tmp_path / "out/dataset.json", "report")[:] == ["report"]
    assert data.facts(tmp_path / "out/dataset.json", "train")["rows"] == 5


def test_strips_text_rows_and_reads_compressed_files(tmp_path):
    import gzip

    with gzip.open(tmp_path / "ptb.train.txt.gz", "wt") as file:
        file.write(" one \n two \n")
    (tmp_path / "ptb.test.txt").write_text(" three \n")
    data.prepare("ptb", entry(tmp_path, "text", train="train", report="test"), tmp_path / "out", needs_selection=False)
    assert data.texts(tmp_path / "out/dataset.json", "train")[:] == ["one", "two"]


def test_maps_columns_to_their_canonical_names(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [{"sentence": "a"}])
    data.prepare("ptb", entry(tmp_path, columns={"text": "sentence"}, report="test"), tmp_path / "out", False)
    assert data.texts(tmp_path / "out/dataset.json", "report")[:] == ["a"]


@pytest.mark.parametrize("in_reverse", [False, True])
def test_renames_a_column_whose_name_another_column_takes_in_any_order(tmp_path, in_reverse):
    """One of the orders used to put the context into the instruction and to lose the question."""
    write_jsonl(tmp_path / "train.jsonl", [{"input": "question", "context": "context", "output": "o", "id": 1}])
    columns = [("instruction", "input"), ("input", "context"), ("output", "output")]
    mine = entry(tmp_path, train="train") | {"columns": dict(reversed(columns) if in_reverse else columns)}
    data.prepare("mine", mine, tmp_path / "out", needs_selection=False)
    [row] = data.load(tmp_path / "out/dataset.json", "train")
    assert row == {"instruction": "question", "input": "context", "output": "o", "id": 1}
    with pytest.raises(DataError, match=r"columns\.prompt: 'id' is mapped twice"):
        data.prepare("mine", mine | {"columns": {"prompt": "id", "completion": "id"}}, tmp_path / "out", False)


def test_names_a_missing_column_and_the_existing_ones(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [{"goal": "a", "sol1": "b"}])
    with pytest.raises(DataError, match=r"piqa.*sol2.*goal, sol1"):
        data.prepare("piqa", entry(tmp_path, report="test"), tmp_path / "out", False, data.TASK_COLUMNS["piqa"])


def test_names_a_garbled_file(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match=r"test\.jsonl"):
        data.prepare("mine", entry(tmp_path, report="test"), tmp_path / "out", False)


def test_rejects_an_empty_split(tmp_path):
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(DataError, match=r"mine"):
        data.prepare("mine", entry(tmp_path, report="test"), tmp_path / "out", False)
    assert not (tmp_path / "out/dataset.json").exists()


def test_samples_selection_rows_from_train_if_there_is_no_split_for_them(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"t{i}"} for i in range(1500)])
    write_jsonl(tmp_path / "validation.jsonl", [{"text": f"r{i}"} for i in range(9)])
    data.prepare("mine", entry(tmp_path, train="train", report="validation"), tmp_path / "out", needs_selection=True)
    chosen = data.texts(tmp_path / "out/dataset.json", "selection")[:]
    assert len(set(chosen)) == data.SELECTION_ROWS and all(text.startswith("t") for text in chosen)
    assert data.facts(tmp_path / "out/dataset.json", "report")["rows"] == 9


def test_takes_selection_rows_from_the_report_rows_if_nothing_else_exists_and_notes_it(tmp_path):
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


def test_the_fingerprint_depends_on_the_rows_and_not_on_the_file(tmp_path):
    rows = [{"text": "a"}, {"text": "b"}]
    write_jsonl(tmp_path / "test.jsonl", rows)
    import pandas

    pandas.DataFrame(rows).to_csv(tmp_path / "test.csv", index=False)
    for form in ("json", "csv"):
        data.prepare("mine", entry(tmp_path, form, report="test"), tmp_path / form, False)
    prints = [data.facts(tmp_path / form / "dataset.json", "report")["fingerprint"] for form in ("json", "csv")]
    assert prints[0] == prints[1]


def test_keeps_text_that_libraries_read_as_missing_values(tmp_path):
    (tmp_path / "train.csv").write_text("instruction,input,output\nsay,,None\nsay,x,NA\nsay,x,null\n")
    data.prepare("mine", entry(tmp_path, "csv", train="train"), tmp_path / "out", needs_selection=False)
    assert data.load(tmp_path / "out/dataset.json", "train")["output"][:] == ["None", "NA", "null"]


@pytest.mark.parametrize("rows", ["a,b,c\nd,e,f\n", "a,b,\nd,e,\n"])
def test_rejects_rows_with_more_cells_than_the_header(tmp_path, rows):
    """All cells would shift by one column: the response would be the cell of the column after it."""
    (tmp_path / "train.csv").write_text(f"instruction,output\n{rows}")
    with pytest.raises(DataError, match=r"train\.csv: rows have more cells.*Quote cells"):
        data.prepare("mine", entry(tmp_path, "csv", train="train"), tmp_path / "out", needs_selection=False)


def test_reads_a_data_frame_that_was_written_with_its_index(tmp_path):
    (tmp_path / "train.csv").write_text("instruction,output,__index_level_0__\na,b,7\n")
    data.prepare("mine", entry(tmp_path, "csv", train="train"), tmp_path / "out", needs_selection=False)
    assert data.load(tmp_path / "out/dataset.json", "train")["output"][:] == ["b"]


def test_ignores_a_byte_order_mark(tmp_path):
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


def test_never_selects_on_report_rows(tmp_path):
    write_jsonl(tmp_path / "validation.jsonl", boolq(*range(6)))
    write_jsonl(tmp_path / "test.jsonl", boolq(4, 5, 6))
    found, record = prepared_boolq(tmp_path, selection="validation", report="test")
    assert found == {"selection": {"q0", "q1", "q2", "q3"}, "report": {"q4", "q5", "q6"}}
    assert records.read(record)["notes"] == ["selection: 2 rows are left out that are report rows too"]
    write_jsonl(tmp_path / "validation.jsonl", boolq(4, 5))
    with pytest.raises(DataError, match=r"all selection rows are report rows.*splits\.selection"):
        prepared_boolq(tmp_path, selection="validation", report="test")


def test_removes_report_rows_from_the_selection_of_a_task_but_not_of_a_text(tmp_path):
    for name in ("validation", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": ""}, {"text": name}])
    rows = {}
    for uses in ((), ("text",)):
        mine = entry(tmp_path, selection="validation", report="test") | {"uses": uses}
        data.prepare("mine", mine, tmp_path / "out", needs_selection=True)
        rows[uses] = data.facts(tmp_path / "out/dataset.json", "selection")["rows"]
    assert rows == {(): 1, ("text",): 2}


def test_reads_a_file_again_that_changed_within_the_same_second(tmp_path):
    """The library's own cache identifies a file by its name and time only."""
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
def test_takes_glob_characters_in_a_path_literally(tmp_path, name):
    for folder, text in ((name, "mine"), ("v1", "other"), ("qx", "other"), ("ab", "other"), ("bx", "other")):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "test.jsonl", [{"text": text}])
    data.prepare("mine", entry(tmp_path / name, report="test"), tmp_path / "out", needs_selection=False)
    assert data.texts(tmp_path / "out/dataset.json", "report")[:] == ["mine"]


def test_rejects_two_files_for_one_split_but_joins_numbered_parts(tmp_path):
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
def test_rejects_rows_without_a_right_answer(tmp_path, task, column, wrong):
    """lm-eval scores each of them as wrong: the public test split of PIQA would give an accuracy of 0."""
    write_jsonl(tmp_path / "test.jsonl", [ROWS[task] | {column: wrong}])
    with pytest.raises(DataError, match=rf"^datasets\.{task}: row 0 of its report rows \(from 0\): "):
        data.prepare(task, entry(tmp_path, report="test"), tmp_path / "out", False, data.TASK_COLUMNS[task])


def test_accepts_rows_with_a_right_answer(tmp_path):
    for task, row in ROWS.items():
        write_jsonl(tmp_path / "test.jsonl", [row])
        data.prepare(task, entry(tmp_path, report="test"), tmp_path / "out", False, data.TASK_COLUMNS[task])
