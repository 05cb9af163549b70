"""Fetching from the hub: from one commit, complete, checked and resumed, with a message if it fails."""

import json
import os
import subprocess
import sys
import time

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from fake_hub import commit_of, serving
from huggingface_hub import constants
from safetensors.numpy import save

from coppice.core import records
from coppice.core.errors import CoppiceError
from coppice.data import fetching

CHECKPOINT = {
    "config.json": b'{"model_type": "tiny"}',
    "model.safetensors": save({"x": numpy.arange(256_000, dtype=numpy.int32)}),
    "vocab.json": b"{}",
}
FILE = "/{repo_id}/resolve/{revision}/{filename}"
SOURCE = {"kind": "hub", "path": "org/tiny"}


@pytest.fixture
def served(monkeypatch, tmp_path):
    """Serve a fake hub with `org/tiny`, which this process takes for the real hub."""
    with serving() as (fake, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "fingerprints"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        fake.add("org/tiny", CHECKPOINT)
        yield fake


@pytest.fixture
def fetch(served, tmp_path):
    """Return `run(revision)`, which fetches `org/tiny` as the model M and returns its record."""

    def run(revision=None):
        record = tmp_path / "resources/models/M/model.json"
        record.unlink(missing_ok=True)  # Snakemake does the same before a rerun
        fetching.fetch_model("M", SOURCE, revision, record)
        return records.read(record)

    return run


def content(tmp_path):
    folder = tmp_path / "resources/models/M/snapshot"
    paths = (path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_records_the_commit_and_the_digest_of_every_file(fetch, tmp_path):
    record = fetch()
    assert record["commit"] == commit_of(CHECKPOINT) and record["revision"] is None
    assert content(tmp_path) == CHECKPOINT
    assert set(record["files"]) == set(CHECKPOINT) and all(len(sha) == 64 for sha in record["files"].values())


def test_does_not_fetch_weights_in_other_layouts(served, fetch, tmp_path):
    others = {"consolidated.safetensors": b"0", "original/params.json": b"1", "pytorch_model.bin": b"2"}
    served.add("org/tiny", CHECKPOINT | others)
    fetch()
    assert content(tmp_path) == CHECKPOINT


def test_keeps_the_commit_when_the_hub_gets_a_newer_one(served, fetch, tmp_path):
    first = fetch()
    served.add("org/tiny", CHECKPOINT | {"config.json": b'{"model_type": "newer"}'})
    assert fetch()["commit"] == first["commit"]
    fetching.fetch_config("M", SOURCE, None, tmp_path / "resources/models/M/config.json")
    assert (tmp_path / "resources/models/M/config.json").read_bytes() == CHECKPOINT["config.json"]


def test_fetches_configuration_and_weights_from_one_commit(served, fetch, tmp_path):
    output = tmp_path / "resources/models/M/config.json"
    fetching.fetch_config("M", SOURCE, None, output)
    served.add("org/tiny", CHECKPOINT | {"config.json": b'{"model_type": "newer"}'})
    assert fetch()["commit"] == commit_of(CHECKPOINT)
    assert output.read_bytes() == content(tmp_path)["config.json"]


def test_another_revision_replaces_all_files(served, fetch, tmp_path):
    fetch()
    weights = save({"x": numpy.zeros(3)})
    newer = {"config.json": b"{}", "model-00001-of-00001.safetensors": weights, "vocab.json": b"{}"}
    commit = served.add("org/tiny", newer)
    assert fetch(commit)["commit"] == commit
    assert content(tmp_path) == newer


def test_does_not_fetch_complete_files_again(served, fetch):
    fetch()
    served.requests.clear()
    fetch()
    assert not served.requests


def test_resumes_a_broken_connection_at_the_byte_where_it_broke(served, fetch, tmp_path):
    served.cut["model.safetensors"] = [400_000]
    fetch()
    assert served.downloads("model.safetensors") == [None, "bytes=400000-"]
    assert content(tmp_path) == CHECKPOINT


def test_fetches_only_incomplete_files_after_a_failed_download(served, fetch, tmp_path):
    served.cut["model.safetensors"] = [400_000] + 9 * [0]
    with pytest.raises(CoppiceError, match=r"models\.M: org/tiny cannot be fetched .*files are kept"):
        fetch()
    served.cut.clear()
    served.requests.clear()
    fetch()
    assert served.downloads("model.safetensors") == [None] and not served.downloads("config.json")
    assert content(tmp_path) == CHECKPOINT


def test_rejects_a_file_with_a_wrong_digest_and_fetches_it_again(served, fetch, tmp_path):
    served.damaged["model.safetensors"] = CHECKPOINT["model.safetensors"][:-1] + b"?"
    with pytest.raises(CoppiceError, match=r"model\.safetensors of org/tiny: the content differs .*fetch` again"):
        fetch()
    served.damaged.clear()
    fetch()
    assert content(tmp_path) == CHECKPOINT


def test_fetches_a_file_again_that_was_damaged_on_this_machine(fetch, tmp_path):
    fetch()
    path = tmp_path / "resources/models/M/snapshot/config.json"
    path.write_bytes(b"{}")
    with pytest.raises(CoppiceError, match=r"config\.json of org/tiny"):
        fetch()
    fetch()
    assert content(tmp_path) == CHECKPOINT


@pytest.mark.parametrize("token", [None, "hf_of-somebody-without-access"])
def test_explains_how_to_get_access_to_a_gated_model(served, fetch, monkeypatch, token):
    served.gated.add("org/tiny")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(
        CoppiceError, match=r"models\.M: org/tiny is gated. Ask for access .*hf auth login.* HF_TOKEN"
    ) as e:
        fetch()
    assert not token or token not in str(e.value)


def test_fetches_a_gated_model_with_the_token_from_the_environment(served, fetch, monkeypatch, tmp_path):
    served.gated.add("org/tiny")
    served.token = "hf_of-somebody-with-access"
    monkeypatch.setenv("HF_TOKEN", served.token)
    fetch()
    assert content(tmp_path) == CHECKPOINT
    written = [path.read_bytes() for path in (tmp_path / "resources").rglob("*") if path.is_file()]
    assert not any(served.token.encode() in text for text in written)


def test_reports_an_invalid_token(served, fetch, monkeypatch):
    served.stale_token = "hf_of-last-year"
    monkeypatch.setenv("HF_TOKEN", served.stale_token)
    with pytest.raises(CoppiceError, match=r"rejects your token.*HF_TOKEN") as raised:
        fetch()
    assert served.stale_token not in str(raised.value)


@pytest.mark.parametrize(
    ("source", "revision", "words"),
    [
        ("org/nothing", None, r"models\.M: org/nothing is not on the hub, or it is private"),
        ("org/tiny", "v9", r"models\.M: org/tiny has no revision 'v9'.*models\.M\.revision"),
        ("org/empty", None, r"models\.M\.base: org/empty has no config\.json"),
        ("org/pickles", None, r"org/pickles has no safetensors weights.*save_pretrained"),
    ],
)
def test_reports_what_the_hub_lacks_before_downloading_anything(served, tmp_path, source, revision, words):
    served.add("org/empty", {"README.md": b""})
    served.add("org/pickles", {"config.json": b"{}", "pytorch_model.bin": b"0"})
    with pytest.raises(CoppiceError, match=words):
        fetching.fetch_model("M", {"kind": "hub", "path": source}, revision, tmp_path / "M/model.json")
    assert not [address for method, address, _ in served.requests if "/resolve/" in address]


def test_reports_a_missing_network(served, fetch, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CoppiceError, match=r"models\.M: org/tiny cannot be fetched \(Connect.*refused"):
        fetch()


def test_reports_that_the_hub_is_switched_off(served, fetch, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CoppiceError, match=r"HF_HUB_OFFLINE is set.*Unset it"):
        fetch()


def rows(*texts):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": list(texts)}), sink)
    return sink.getvalue().to_pybytes()


DATASET = """
import sys
from coppice.data import fetching
from coppice.core.errors import CoppiceError
entry = {"source": {"kind": "hub", "path": "org/texts"}, "path": "org/texts", "splits": {"train": "train"}}
try:
    fetching.fetch_dataset("texts", entry, False, sys.argv[1])
except CoppiceError as error:
    sys.exit(f"said: {error}")
"""


def test_keeps_the_commit_of_a_dataset_and_explains_a_failure(tmp_path):
    """Fetches in new processes, because the library reads the hub's address once, at import."""
    record = tmp_path / "resources/datasets/texts/dataset.json"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment["HF_HOME"] = str(tmp_path / "home")

    def fetch(address):
        command = [sys.executable, "-c", DATASET, str(record)]
        environment.update(HF_ENDPOINT=address, PYTHONPATH=os.pathsep.join(sys.path))
        return subprocess.run(command, env=environment, text=True, capture_output=True, check=False)

    with serving() as (fake, address):
        commit = fake.add("org/texts", {"train.parquet": rows("one", "two")}, "datasets")
        fake.gated.add("org/texts")
        assert "said: datasets.texts: org/texts is gated. Ask for access" in fetch(address).stderr
        fake.gated.clear()
        assert fetch(address).returncode == 0
        first = records.read(record)
        assert first["source"]["commit"] == commit
        fake.add("org/texts", {"train.parquet": rows("three")}, "datasets")
        record.unlink()
        assert fetch(address).returncode == 0
        again = records.read(record)
        assert again | {"provenance": None} == first | {"provenance": None}  # provenance holds the time of the run


def test_rejects_chat_prompts_for_a_model_without_a_chat_template(tiny_checkpoint, tmp_path):
    def register(prompt):
        source = {"kind": "local", "path": str(folder)}
        fetching.fetch_model("M", source, None, tmp_path / "model.json", prompt)

    folder = tiny_checkpoint()
    register("chat")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    register("alpaca")
    with pytest.raises(CoppiceError, match=r"models\.M\.prompt: is chat .* has no chat template.*alpaca or"):
        register("chat")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    register("chat")
