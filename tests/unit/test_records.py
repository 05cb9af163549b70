"""Records: written whole or not at all, and never taken for good when they were damaged."""

import json

import pytest

from coppice.core import fingerprints, records
from coppice.planning import gathered_inputs


def test_a_record_comes_back_as_it_was_written(tmp_path):
    records.write(tmp_path / "a.json", {"value": 1.5, "name": "Grüße"})
    assert records.read(tmp_path / "a.json") == {"schema_version": 1, "value": 1.5, "name": "Grüße"}


def test_a_number_that_is_not_finite_is_refused_with_its_place_and_leaves_no_file(tmp_path):
    with pytest.raises(records.RecordError, match=r"perplexity\.ptb\.value"):
        records.write(tmp_path / "a.json", {"perplexity": {"ptb": {"value": float("nan")}}})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_record(tmp_path):
    path = tmp_path / "a.json"
    records.write(path, {"value": 1})
    with pytest.raises(RuntimeError), records.atomic(path) as file:
        file.write("half")
        raise RuntimeError
    assert records.read(path)["value"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"value": 1', '"value": 2'),
        lambda text: text.replace('"value": 1', '"value": NaN'),
        lambda text: "",
        lambda text: "[]",
        lambda text: json.dumps({"schema_version": 1, "value": 1}),
    ],
    ids=["truncated", "edited", "not a number", "empty", "not an object", "no checksum"],
)
def test_a_damaged_record_is_an_error_that_names_file_and_remedy(tmp_path, damage):
    path = tmp_path / "a.json"
    records.write(path, {"value": 1})
    path.write_text(damage(path.read_text()))
    with pytest.raises(records.RecordError, match=r"a\.json.*delete it"):
        records.read(path)


def test_a_file_is_hashed_again_when_it_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"one")
    first = fingerprints.file_digest(path)
    assert fingerprints.file_digest(path) == first
    path.write_bytes(b"two")
    assert fingerprints.file_digest(path) != first


def test_an_unchanged_file_is_not_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"one")
    first = fingerprints.file_digest(path)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("the file was read again"))
    assert fingerprints.file_digest(path) == first


def test_a_file_is_hashed_where_nobody_is_at_home(tmp_path, monkeypatch):
    """As in a container under a number that no account has."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["no such account"])
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"one")
    assert fingerprints.file_digest(path) == fingerprints.content_digest(path)
    assert fingerprints.known_digest(path) is None


def test_a_gathered_file_changes_with_what_the_files_say_and_not_with_when_they_were_made(tmp_path):
    record, rows, gathered = (tmp_path / name for name in ("dataset.json", "rows.yaml", "gathered.json"))
    records.write(record, {"rows": 3, "provenance": {"started": "today"}})
    rows.write_text("a")
    gathered_inputs.gather([record, rows], gathered)
    before = gathered.read_bytes()
    records.write(record, {"rows": 3, "provenance": {"started": "tomorrow"}})
    gathered_inputs.gather([record, rows], gathered)
    assert gathered.read_bytes() == before
    records.write(record, {"rows": 4})
    gathered_inputs.gather([record, rows], gathered)
    assert gathered.read_bytes() != before


def test_a_gathered_file_goes_where_it_names_one_that_is_gone(tmp_path):
    """Else nothing would make that one again."""
    kept, lost = tmp_path / "kept.json", tmp_path / "lost.json"
    for name, path in (("whole", kept), ("stale", lost)):
        records.write(path, {})
        gathered_inputs.gather([path], tmp_path / f".gathered/{name}.json")
    lost.unlink()
    assert [path.stem for path in gathered_inputs.forget_stale(tmp_path / ".gathered")] == ["stale"]
    assert (tmp_path / ".gathered/whole.json").is_file()
