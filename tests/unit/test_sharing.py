"""A folder of resources that several studies share: no study uses what another one made with other settings."""

import json
import shutil

import pytest

from coppice import data
from coppice.core import records
from coppice.study import layout, settings, shared_resources

SPLITS = {"train": None, "selection": None}


@pytest.fixture
def differing_records(tmp_path):
    """Return `find(base, **dataset)`, which returns the records that a study of model M and dataset mine cannot use."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text('{"model_type": "llama"}')
        rows = [{"text": f"{folder} {i}"} for i in range(3)]
        for split in ("train", "test"):
            (tmp_path / folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def find(base="one", write=False, path="one", **dataset):
        entry = {"path": str(tmp_path / path), "format": "json", "splits": SPLITS} | dataset
        study = settings.load(
            {
                "resources": str(tmp_path / "resources"),
                "models": {"M": {"base": str(tmp_path / base)}},
                "datasets": {"mine": entry},
                "evaluate": {"perplexity": {"datasets": ["mine"]}},
                "select": {"configs": {"best_ppl": {"metric": "ppl.mine", "mode": "min"}}},
            }
        )
        files = layout.Files(study)
        if write:
            source = study.models["M"].source.model_dump()
            records.write(files.model("M"), {"source": source, "revision": None, "path": source["path"]})
            entry = study.dataset("mine").model_dump()
            data.prepare("mine", entry, tmp_path / "resources/datasets/mine", needs_selection=False)
        return {
            path.removeprefix(f"{tmp_path}/resources/"): difference
            for path, difference in shared_resources.differing_records(study, files).items()
        }

    assert find() == {}  # nothing is there yet
    find(write=True)
    return find


def test_accepts_what_was_made_with_the_same_settings(differing_records):
    assert differing_records() == {}


def test_reports_a_model_with_another_base(differing_records, tmp_path):
    difference = f"was made with base {tmp_path / 'one'}, but models.M.base is {tmp_path / 'two'}"
    assert differing_records(base="two") == {"models/M/model.json": difference}


@pytest.mark.parametrize(
    ("other", "key", "theirs"),
    [
        ({"path": "two"}, "path", "/one"),
        ({"splits": SPLITS | {"report": "train"}}, "splits", "{'report': 'test'}"),
        ({"columns": {"text": "other"}}, "columns", "{}"),
    ],
)
def test_reports_the_key_in_which_a_dataset_differs(differing_records, other, key, theirs):
    [(path, difference)] = differing_records(**other).items()
    assert path == "datasets/mine/dataset.json"
    made, asked = difference.split(f", but datasets.mine.{key} is ")
    assert made.startswith(f"was made with {key} ") and made.endswith(theirs) and asked != theirs


def test_accepts_a_model_pinned_to_the_fetched_commit():
    recorded = {"source": {"kind": "hub", "path": "some/llama"}, "revision": None, "commit": "abc"}
    pinned = {
        revision: settings.load({"models": {"M": {"base": "some/llama", "revision": revision}}}).models["M"]
        for revision in ("abc", "def")
    }
    assert shared_resources._of_model(recorded, pinned["abc"]) is None
    assert shared_resources._of_model(recorded, pinned["def"]) == ("revision", None, "def")


def test_accepts_the_same_files_in_another_folder(differing_records, tmp_path):
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    assert differing_records(path="moved") == {}


def test_leaves_an_unreadable_record_to_its_job(differing_records, tmp_path):
    (tmp_path / "resources/models/M/model.json").write_text("{")
    assert differing_records(base="two") == {}
