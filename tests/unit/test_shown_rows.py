"""The first rows of a data set in the study report: pictures, questions, references and answers."""

import base64
import io
import json
import re

import pytest
from PIL import Image
from synthetic_kinds import mixed

from coppice import data
from coppice.core import records
from coppice.report import study_report
from coppice.report.study_report import shown_rows
from coppice.report.study_report import study_records as studies

COLORS = ((200, 30, 30), (30, 30, 200), (30, 160, 30), (10, 10, 10), (240, 200, 0))
ASKED = "What is <b>there</b> & where?"


def prepared(folder, name, rows, side):
    """Prepare a data set of pictures and return its dataset.json."""
    source = folder / "source" / name
    source.mkdir(parents=True)
    for place, row in enumerate(rows):
        Image.new("RGB", (side, side // 2), COLORS[place % len(COLORS)]).save(source / f"{place}.png")
        row["image"] = f"{place}.png"
    (source / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    entry = {"path": str(source), "format": "json", "splits": {"report": "test"}, "uses": ["training"]}
    data.prepare(name, entry, folder / "resources" / name, False)
    return folder / "resources" / name / "dataset.json"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Return a built study of an image-text model and a dual encoder, whose data sets are there."""
    folder = tmp_path_factory.mktemp("study")
    asked = prepared(folder, "questions", [{"question": ASKED, "answer": f"it is {i}"} for i in range(6)], 400)
    pairs = prepared(folder, "pairs", [{"captions": [f"no {i}", f"number {i}"]} for i in range(6)], 64)
    built = mixed(folder / "results", items=40, configs=("best_acc",), View="image-text", Clip="dual", Code="code")
    built.prints = {"questions": data.fingerprint(asked, "report"), "pairs": data.fingerprint(pairs, "report")}
    built.build()
    files = {str(path): "" for path in (asked, pairs)}
    records.write(built.results / ".gathered/rows/View/report.json", {"files": files})
    return built


def found(study, model):
    pair = studies.read(study.results, study.pairs, study.models).pair(model, "best_acc")
    return {entry["dataset"]: entry["rows"] for entry in shown_rows.of_pair(pair, shown_rows.data_sets(study.results))}


def decoded(uri):
    kind, content = re.fullmatch(r"data:image/(\w+);base64,(.+)", uri).groups()
    return kind, Image.open(io.BytesIO(base64.b64decode(content)))


def test_shows_what_each_stage_answered_to_the_first_rows_beside_their_pictures(study):
    import pandas

    rows = found(study, "View")["questions"]
    assert len(rows) == shown_rows.ROWS
    for place, row in enumerate(rows):
        kind, image = decoded(row["pictures"][0])
        assert kind == "jpeg" and max(image.size) == shown_rows.SIDE  # scaled down
        assert all(abs(a - b) < 12 for a, b in zip(image.getpixel((9, 9)), COLORS[place], strict=True))
        assert row["question"] == ASKED
        for stage, text in row["answers"].items():
            folder = study.folder(stage, "View", None if stage == "dense" else "best_acc")
            own = pandas.read_parquet(folder / "samples/questions.parquet").iloc[place]
            assert text == own["answer"] and row["references"] == list(own["references"])


def test_shows_the_rank_of_a_right_caption_beside_a_small_picture(study):
    rows = found(study, "Clip")["pairs"]
    kind, image = decoded(rows[1]["pictures"][0])
    assert kind == "png" and image.getpixel((5, 5)) == COLORS[1]  # not compressed
    assert rows[1]["references"] == ["no 1", "number 1"]
    assert all(text.startswith("a right caption has rank ") for text in rows[1]["answers"].values())


def test_shows_classes_and_code_without_pictures(study):
    [row, *_] = found(study, "Clip")["classes"]
    assert row["references"] == ["circle"] and row["answers"]["dense"] == "star" and not row["pictures"]
    assert "texts" in found(study, "Code")


def test_the_page_embeds_pictures_and_escapes_texts(study):
    study_report.write_report(study.results, study.pairs, study.models, study.results / "report")
    html = (study.results / "report/study_report.html").read_text()
    images = re.findall(r'<img src="(data:image/[^"]+)" alt="([^"]+)"', html)
    assert len(images) == html.count("<img") == 2 * shown_rows.ROWS
    assert images[0][1] == "questions, row 1: picture 1"
    assert "<b>there</b>" not in html and "&lt;b&gt;there&lt;/b&gt; &amp; where?" in html
    assert "img-src data:" in html


def test_a_picture_that_is_gone_or_changed_is_left_out(study):
    path = study.results.parent / "source/questions/1.png"
    content = path.read_bytes()
    try:
        path.write_bytes(b"other")
        rows = found(study, "View")["questions"]
        assert [len(row["pictures"]) for row in rows] == [1, 0, 1, 1]
    finally:
        path.write_bytes(content)


def test_without_the_data_set_answers_remain(study):
    pair = studies.read(study.results, study.pairs, study.models).pair("View", "best_acc")
    [entry] = shown_rows.of_pair(pair, shown_rows.DataSets())
    assert entry["rows"][0]["answers"]["dense"] and entry["rows"][0]["pictures"] == []


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"messages": [{"role": "user", "content": "first"}, {"role": "assistant", "content": "no"}]}, "first"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]}]}, "Who?"),
        ({"instruction": "Do", "output": "done"}, "Do"),
        ({"prefix": "a = ", "suffix": "\nb", "middle": "1"}, "a = […]\nb"),
        ({"question": "x" * 1000}, "x" * shown_rows.LONGEST + "…"),
        ({"caption": "only"}, ""),
    ],
)
def test_the_question_of_a_row_is_its_text_before_the_answer(row, text):
    assert shown_rows.question(row) == text
