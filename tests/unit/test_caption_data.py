"""Caption data from COCO's annotations, detections and any JSON; rows divided by group."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as some

from coppice import cli
from coppice.core.errors import CoppiceError, SettingsError
from coppice.data import builders, prompts
from coppice.data.builders import grouped_rows

CATEGORIES = [{"id": 1, "name": "dog"}, {"id": 2, "name": "ball"}]


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = isinstance(content, list) and path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content), encoding="utf-8")
    return path


def coco(folder, images=20):
    """Write captions and instances of some images; return their paths."""
    listed = [
        {"id": number, "file_name": f"{number:012d}.jpg", "width": 300, "height": 300} for number in range(images)
    ]
    texts = [{"image_id": number, "caption": f"caption {n} of {number}"} for number in range(images) for n in range(5)]
    boxes = [
        {"image_id": number, "category_id": 1 + n, "bbox": [200 * n, 0, 60 + 90 * n, 60], "iscrowd": 0}
        for number in range(images)
        for n in range(2)
    ]
    captions = written(folder / "captions.json", {"images": listed, "annotations": texts})
    instances = {"images": listed, "annotations": boxes, "categories": CATEGORIES}
    return captions, written(folder / "instances.json", instances)


def built(tmp_path, ratios=(1,), seed=42, **choices):
    target = builders.Target(tmp_path / "out/captions.jsonl", ratios, seed, force=True)
    report = builders.build_caption_data(builders.CaptionData(**choices), target)
    return report, {role: list(map(json.loads, target.file_of(role).open())) for role in target.shares}


def test_makes_prompts_of_cocos_instances(tmp_path):
    captions, instances = coco(tmp_path)
    report, rows = built(tmp_path, captions=captions, instances=instances)
    assert report["roles"]["train"]["rows"] == 20 and report["captions"] == {"train": 100}
    row = next(row for row in rows["train"] if row["image_id"] == 3)
    # the larger one first: 150 x 60 of 300 x 300 pixels is a tenth, 60 x 60 a twenty-fifth
    assert row["prompt"] == "Describe the picture. It shows ball, medium, top right; dog, small, top left."
    assert row["captions"] == [f"caption {n} of 3" for n in range(5)]
    assert prompts.kind_of(row, "captions", ("caption",)) == "caption"


def test_makes_prompts_of_detections_above_a_score(tmp_path):
    captions, instances = coco(tmp_path, images=4)
    found = [
        {"image_id": 0, "category_id": 2, "bbox": [0, 200, 30, 60], "score": 0.7},
        {"image_id": 0, "category": "cat", "bbox": [0, 0, 300, 300], "score": 0.9},
        {"image_id": 0, "category": "noise", "bbox": [0, 0, 9, 9], "score": 0.1},
        {"image_id": 1, "category": "noise", "bbox": [0, 0, 9, 9], "score": 0.1},
    ]
    detections = written(tmp_path / "found.json", found)
    report, rows = built(tmp_path, captions=captions, instances=instances, detections=detections, min_score=0.5)
    shown = "Describe the picture. It shows cat, large, center (0.90); ball, small, bottom left (0.70)."
    assert [row["prompt"] for row in rows["train"]] == [shown]
    assert report["images"] == {"seen": 4, "left_out": {"without an object": 3}}


def test_pairs_images_with_their_captions(tmp_path):
    captions, _ = coco(tmp_path)
    _, rows = built(tmp_path, captions=captions, rows="image")
    assert rows["train"][2]["image"] == "000000000002.jpg" and len(rows["train"][2]["captions"]) == 5
    assert prompts.kind_of(rows["train"][2], "captions", ("image-caption",)) == "image-caption"


def test_fills_a_template_from_any_json(tmp_path):
    items = [{"image": f"{n // 2}.png", "tags": ["a", "b"], "score": n / 10, "caption": f"c{n}"} for n in range(20)]
    source = written(tmp_path / "items.jsonl", items)
    template = tmp_path / "prompt.j2"
    template.write_text("Tags: {{ tags | join(', ') }} ({{ '%.1f' % score }})")
    for given_as in (template.read_text(), str(template)):
        _, rows = built(tmp_path, (0.6, 0.2, 0.2), items=source, template=given_as)
        row = next(row for own in rows.values() for row in own if row["captions"] == ["c3"])
        assert row["prompt"] == "Tags: a, b (0.3)" and row["image_id"] == "1.png"
        sides = [{row["image_id"] for row in own} for own in rows.values()]
        assert sum(map(len, sides)) == 10 == len(set.union(*sides))


def test_a_template_does_not_read_captions_and_runs_no_code(tmp_path):
    source = written(tmp_path / "items.json", [{"caption": "secret", "x": 1}])
    for template in ("{{ caption }}", "{{ x.__class__.__mro__[1].__subclasses__() }}"):
        with pytest.raises(CoppiceError, match=r"row 0 \(from 0\): the template cannot be filled in"):
            built(tmp_path, items=source, template=template)


def test_leaves_out_images_without_captions(tmp_path):
    captions, _ = coco(tmp_path, images=3)
    content = json.loads(captions.read_text())
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != 1]
    content["annotations"][0]["caption"] = "  "
    report, rows = built(tmp_path, captions=written(captions, content), rows="image")
    assert [len(row["captions"]) for row in rows["train"]] == [4, 5]
    assert report["images"]["left_out"] == {"without a caption": 1}


def test_a_sample_has_the_size_and_the_shares_that_were_asked_for(tmp_path, capsys):
    captions, instances = coco(tmp_path, images=300)
    words = ["build-caption-data", "--captions", captions, "--instances", instances, "--output", tmp_path / "c.jsonl"]
    assert cli.main([*map(str, words), "--sample-count", "200", "--train-ratio", "0.9", "--seed", "42"]) == 0
    entry = yaml.safe_load(capsys.readouterr().out.partition("datasets:\n")[2])["c"]
    sizes = {role: len((tmp_path / file).read_text().splitlines()) for role, file in entry["splits"].items()}
    assert sizes == {"train": 180, "selection": 10, "report": 10}
    first = (tmp_path / "c.jsonl").read_bytes()
    assert cli.main([*map(str, words), "--sample-count", "200", "--train-ratio", "0.9", "--force"]) == 0
    assert (tmp_path / "c.jsonl").read_bytes() == first


BAD = {
    "no list": ({"images": []}, "needs the lists images and annotations"),
    "no id": ({"images": [{}], "annotations": []}, "image 0 .from 0.: has no id"),
    "odd id": ({"images": [{"id": [1]}], "annotations": []}, "neither text nor a whole number"),
    "other image": ({"images": [{"id": 1}], "annotations": [{"image_id": 2}]}, "annotation 0 .from 0.: is of image 2"),
    "no image": ({"images": [3], "annotations": []}, "has no id"),
}


@pytest.mark.parametrize("name", BAD)
def test_names_the_file_and_the_place_of_a_wrong_annotation(tmp_path, name):
    content, message = BAD[name]
    path = written(tmp_path / "captions.json", content)
    with pytest.raises(CoppiceError, match=f"captions.json.*{message}"):
        built(tmp_path, captions=path, rows="image")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [1, 2, 3]}, "must be four numbers"),
        ({"bbox": [1, 2, 3, "x"]}, "bbox is 'x', which is no number"),
        ({"category_id": 9}, "its category 9 has no name"),
        ({"score": None}, "score is None, which is no number"),
    ],
)
def test_names_the_object_that_is_wrong(tmp_path, change, message):
    captions, instances = coco(tmp_path)
    content = json.loads(instances.read_text())
    content["annotations"][3] |= change
    with pytest.raises(CoppiceError, match=rf"instances.json, object 3 \(from 0\).*{message}"):
        built(tmp_path, captions=captions, instances=written(instances, content))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({}, "captions, items: give one of them"),
        ({"captions": "a", "items": "b"}, "captions, items: give one of them"),
        ({"items": "a"}, "template: is needed"),
        ({"captions": "a"}, "instances, detections"),
        ({"items": "a.json", "template": "{{ x"}, "template: cannot be used"),
        ({"items": "a.json", "template": "x"}, "a.json: cannot be read"),
        ({"items": "a.txt", "template": "x"}, "a.txt: has an unsupported suffix"),
    ],
)
def test_rejects_wrong_choices(tmp_path, choices, message):
    with pytest.raises(CoppiceError, match=message):
        built(tmp_path, **choices)


# Division of rows


def split(tmp_path, source, group_by=(), ratios=(0.6, 0.2, 0.2), **choices):
    target = builders.Target(tmp_path / "out/rows.train.jsonl", ratios, force=True)
    report = builders.split_data(builders.SplitData(source, group_by, **choices), target)
    return report, {role: list(map(json.loads, target.file_of(role).open())) for role in target.shares}


@given(some.lists(some.lists(some.integers(0, 30), min_size=1, max_size=3), min_size=12, max_size=40), some.integers())
def test_no_image_is_on_two_sides(pictures, seed):
    rows = [{"images": [f"{one}.png" for one in own], "n": number} for number, own in enumerate(pictures)]
    groups = grouped_rows.groups_of(rows, ["images"], "rows")
    for row, group in zip(rows, groups, strict=True):
        for other, its_group in zip(rows, groups, strict=True):
            if set(row["images"]) & set(other["images"]):
                assert group == its_group
    again = grouped_rows.groups_of(rows[::-1], ["images"], "rows")[::-1]
    assert groups == again


def test_divides_rows_of_every_format_without_changing_them(tmp_path):
    import pandas

    rows = [{"image_id": f"i{n // 3}", "question": f"q{n}", "n": n} for n in range(60)]
    table = pandas.DataFrame(rows)
    table.to_csv(tmp_path / "rows.csv", index=False)
    table.to_parquet(tmp_path / "rows.parquet")
    sources = [written(tmp_path / "rows.json", rows), written(tmp_path / "rows.jsonl", rows)]
    found = [
        split(tmp_path, path, ["image_id"])[1] for path in (*sources, tmp_path / "rows.csv", tmp_path / "rows.parquet")
    ]
    assert all(one == found[0] for one in found)
    assert sorted((row for own in found[0].values() for row in own), key=lambda row: row["n"]) == rows
    sides = [{row["image_id"] for row in own} for own in found[0].values()]
    assert [len(side) for side in sides] == [12, 4, 4] and len(set.union(*sides)) == 20
    assert (tmp_path / "out/rows.selection.jsonl").is_file()


def test_equal_rows_stay_together_without_a_group(tmp_path):
    rows = [{"text": f"t{n % 20}"} for n in range(60)]
    _, found = split(tmp_path, written(tmp_path / "rows.json", rows), ratios=(0.5, 0.5))
    assert not {row["text"] for row in found["train"]} & {row["text"] for row in found["selection"]}


def test_a_sample_takes_whole_groups(tmp_path):
    rows = [{"image_id": n // 3} for n in range(60)]
    report, found = split(tmp_path, written(tmp_path / "rows.json", rows), ["image_id"], sample_count=20)
    assert sum(map(len, found.values())) == 21
    assert report["groups"] == {"train": 5, "selection": 1, "report": 1} or sum(report["groups"].values()) == 7


def test_the_command_divides_a_file(tmp_path, capsys):
    source = written(tmp_path / "rows.json", [{"image_id": n // 3} for n in range(60)])
    words = ["split-data", str(source), "--group-by", "image_id", "--output", str(tmp_path / "rows.train.jsonl")]
    assert cli.main([*words, "--ratios", "0.9", "0.1"]) == 0
    assert "train: 54 rows, 18 groups" in capsys.readouterr().out
    assert (tmp_path / "rows.selection.jsonl").is_file()
    assert cli.main([*words, "--force", "--group-by", "picture"]) == 1
    assert "row 0 (from 0): has no picture (it has image_id)" in capsys.readouterr().err


def test_rejects_a_sample_of_nothing(tmp_path):
    with pytest.raises(SettingsError, match="at least 1"):
        builders.SplitData("a.json", sample_count=0)
