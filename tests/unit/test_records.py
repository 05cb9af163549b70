"""Records are written completely or not at all, and damaged ones are rejected."""

import json

import pytest

from coppice.core import fingerprints, records
from coppice.planning import gathered_inputs


def test_reads_a_record_as_it_was_written(tmp_path):
    records.write(tmp_path / "a.json", {"value": 1.5, "name": "Grüße"})
    assert records.read(tmp_path / "a.json") == {"schema_version": 1, "value": 1.5, "name": "Grüße"}


def test_rejects_a_number_that_is_not_finite_and_names_its_key(tmp_path):
    with pytest.raises(records.RecordError, match=r"perplexity\.ptb\.value"):
        records.write(tmp_path / "a.json", {"perplexity": {"ptb": {"value": float("nan")}}})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_record(tmp_path):
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
def test_names_a_damaged_record_and_its_remedy(tmp_path, damage):
    path = tmp_path / "a.json"
    records.write(path, {"value": 1})
    path.write_text(damage(path.read_text()))
    with pytest.raises(records.RecordError, match=r"a\.json.*delete it"):
        records.read(path)


def test_hashes_a_file_again_when_it_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"one")
    first = fingerprints.file_digest(path)
    assert fingerprints.file_digest(path) == first
    path.write_bytes(b"two")
    assert fingerprints.file_digest(path) != first


def test_does_not_read_an_unchanged_file_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"one")
    first = fingerprints.file_digest(path)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("the file was read again"))
    assert fingerprints.file_digest(path) == first


def test_hashes_a_file_without_a_home_folder(tmp_path, monkeypatch):
    """As in a container that runs under a user id without an account."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["no such account"])
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"one")
    assert fingerprints.file_digest(path) == fingerprints.content_digest(path)
    assert fingerprints.cached_digest(path) is None


def test_a_gathered_file_depends_on_the_content_of_its_files_and_not_on_their_age(tmp_path):
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


def test_removes_a_gathered_file_that_names_a_missing_file(tmp_path):
    """Otherwise nothing would make the missing file again."""
    kept, lost = tmp_path / "kept.json", tmp_path / "lost.json"
    for name, path in (("whole", kept), ("stale", lost)):
        records.write(path, {})
        gathered_inputs.gather([path], tmp_path / f".gathered/{name}.json")
    lost.unlink()
    assert [path.stem for path in gathered_inputs.forget_stale(tmp_path / ".gathered")] == ["stale"]
    assert (tmp_path / ".gathered/whole.json").is_file()
