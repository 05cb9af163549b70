"""No picture is on two sides of a study, every row about a picture has one, and labels are names."""

import json

import datasets
import numpy
import pytest
from PIL import Image

from coppice import data
from coppice.core.errors import DataError, SettingsError
from coppice.stages.recover import examples


def pictures(folder, count):
    """Write `count` distinct pictures to a folder, and return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, names = numpy.random.default_rng(0), [f"é {number}.png" for number in range(count)]
    for name in names:
        Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=numpy.uint8)).save(folder / name)
    return names


def prepared(tmp_path, splits, uses, **entry):
    """Prepare rows by role as the data set `mine`, and return its record. splits: role -> rows."""
    for role, rows in splits.items():
        (tmp_path / f"mine/{role}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    entry = {"path": str(tmp_path / "mine"), "format": "json", "uses": uses, **entry}
    entry |= {"splits": {role: f"{role}.jsonl" for role in splits}}
    data.prepare("mine", entry, tmp_path / "out")
    return tmp_path / "out/dataset.json"


def shown(record, role):
    """Return the digests of the pictures of a role's rows."""
    return {picture["sha256"] for row in data.load(record, role).to_list() for picture in row["images"]}


def captioned(names, each=3):
    return [{"image": name, "caption": f"{name} in {number} words"} for name in names for number in range(each)]


def test_selection_and_report_share_no_picture_if_they_come_from_one_split(tmp_path):
    names = pictures(tmp_path / "mine", 20)
    record = prepared(tmp_path, {"report": captioned(names)}, ["retrieval"])
    sides = [shown(record, role) for role in ("selection", "report")]
    assert sides[0] and sides[0].isdisjoint(sides[1]) and len(sides[0] | sides[1]) == 20


def test_selection_loses_the_pictures_of_report_even_with_other_captions_and_names(tmp_path):
    names = pictures(tmp_path / "mine", 6)
    (tmp_path / "mine/copy.png").write_bytes((tmp_path / "mine" / names[0]).read_bytes())
    splits = {"report": captioned(names[:3]), "selection": captioned(["copy.png", *names[3:]], 1)}
    record = prepared(tmp_path, splits, ["retrieval"])
    assert len(data.load(record, "selection")) == 3 and shown(record, "selection").isdisjoint(shown(record, "report"))
    assert data.facts(record, "selection")["notes"] == [
        "selection: 1 rows are left out that show pictures of report rows too"
    ]
    with pytest.raises(DataError, match=r"all selection rows show pictures of report rows too.*splits\.selection"):
        prepared(tmp_path, {"report": captioned(names), "selection": captioned(names, 1)}, ["retrieval"])


class Source:
    """A data set of which only the columns of its rows are known."""

    def __init__(self, digests):
        self.rows = [{"images": [{"sha256": digest}]} if digest else {} for digest in digests]


@pytest.mark.parametrize("size", [4, 0.3])
def test_validation_shows_no_picture_of_training(size):
    digests = [f"picture {place % 5}" for place in range(15)] + [None] * 5
    pairs = [("mine", place) for place in range(20)]
    for seed in range(5):
        parts = examples._split(pairs, size, seed, {"mine": Source(digests)})
        trained, held = ({digests[place] for _, place in part} - {None} for part in parts)
        assert trained.isdisjoint(held) and 4 <= len(parts[1]) <= 8 and sorted(parts[0] + parts[1]) == pairs


def test_pictures_that_leave_nothing_to_train_on_are_an_error():
    pairs = [("mine", place) for place in range(6)]
    with pytest.raises(SettingsError, match=r"val_size: 2 rows .* only 6, of 1 pictures, and none would be left"):
        examples._split(pairs, 2, 0, {"mine": Source(["one"] * 6)})


@pytest.mark.parametrize(("role", "use"), [("train", "training"), ("report", "answers"), ("report", "retrieval")])
def test_names_the_row_without_a_picture(tmp_path, role, use):
    rows = [*captioned(pictures(tmp_path / "mine", 2), 1), {"image": None, "caption": "nothing"}]
    with pytest.raises(DataError, match=rf"datasets\.mine: row 2 of its {role} rows \(from 0\) has no picture"):
        prepared(tmp_path, {role: rows}, [use])


@pytest.mark.parametrize("label", [None, " "])
def test_names_the_row_whose_label_is_empty_before_a_model_is_loaded(tmp_path, label):
    names = pictures(tmp_path / "mine", 2)
    rows = [{"image": name, "label": said} for name, said in zip(names, ["a", label], strict=True)]
    with pytest.raises(DataError, match=r"datasets\.mine: row 1 of its report rows \(from 0\) has an empty label"):
        prepared(tmp_path, {"report": rows}, ["classification"])


def test_names_the_columns_that_a_measurement_needs_when_rows_are_read(tmp_path):
    rows = captioned(pictures(tmp_path / "mine", 2))
    with pytest.raises(DataError, match=r"datasets\.mine: its rows need the columns image \| images and label"):
        prepared(tmp_path, {"report": rows}, ["classification"])


def test_numbered_classes_are_read_by_their_names(tmp_path):
    names = pictures(tmp_path / "mine", 3)
    features = datasets.Features(
        {"image": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat", "sea otter"])}
    )
    table = datasets.Dataset.from_list(
        [{"image": name, "label": label} for name, label in zip(names, [1, 0, 1], strict=True)], features=features
    )
    table.to_parquet(tmp_path / "mine/report.parquet")
    entry = {"path": str(tmp_path / "mine"), "format": "parquet", "uses": ["classification"]}
    data.prepare("mine", entry | {"splits": {"report": "report.parquet"}}, tmp_path / "out", False)
    found = data.load(tmp_path / "out/dataset.json", "report")["label"]
    assert list(found) == ["sea otter", "cat", "sea otter"]


@pytest.mark.parametrize("role", ["train", "report"])
def test_names_the_columns_that_a_kind_of_model_needs_when_rows_are_read(tmp_path, role):
    (tmp_path / "mine").mkdir()
    rows = [{"instruction": f"add 1 and {number}", "output": f"{number + 1}"} for number in range(20)]
    use = "training" if role == "train" else "answers"
    prepared(tmp_path, {role: rows}, [use, f"{use}:seq2seq"])
    with pytest.raises(DataError, match=r"datasets\.mine: its rows need the columns image \| images and caption"):
        prepared(tmp_path, {role: rows}, [f"{use}:dual-encoder"])


def test_too_few_rows_to_choose_and_report_by_are_an_error_that_says_so(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match=r"its 1 report rows cannot be divided.*Set datasets\.mine\.splits\.selection"):
        prepared(tmp_path, {"report": [{"input": "a", "target": "b"}]}, ["answers"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "<image> and <image>?", "answer": "a"},
            "row 1 .* marks 2 pictures with <image>, but",
        ),
        (
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "an <image>"}]},
            "row 1 .*an answer contains <image>",
        ),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "row 1 .* marks 0 pictures with <image>, but .* has 1"),
    ],
)
def test_marks_are_counted_when_rows_are_read(tmp_path, row, message):
    name = pictures(tmp_path / "mine", 1)[0]
    good = {"question": "?", "answer": "a"}
    if "messages" in row:
        good = {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, {"train": [{"image": name} | good, {"image": name} | row]}, ["training:image-text"])
