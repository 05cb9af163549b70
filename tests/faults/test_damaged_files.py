"""Files that are truncated, garbled, empty, missing or a folder: each reader names the file in one line.

A reader may raise only `CoppiceError`. Readers of files that need not exist (a status file, a cache) go on.
"""

import gzip
import json
import shutil
import struct
from pathlib import Path

import pyarrow
import pytest
from disturbance import without_root, world_writable_folder
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from test_bad_configuration import MODEL, load_table, message_of

from coppice import data, models
from coppice.core import fingerprints, gpus, records
from coppice.core.errors import CoppiceError
from coppice.data import fetching
from coppice.models import estimates, files
from coppice.report.study_report import job_status, study_records
from coppice.stages.prune import candidates
from coppice.stats import stored_samples
from coppice.study import settings
from coppice.study.settings import config_files

NOISE = bytes((i * 197 + i * i * 31) % 256 for i in range(400))
DAMAGES = {
    "empty": lambda content: b"",
    "torn": lambda content: content[: len(content) // 2],
    "garbled": lambda content: NOISE,
    "null bytes": lambda content: b"\0" * 100,
    "UTF-16": lambda content: "a: 1\n".encode("utf-16"),
    "a number": lambda content: b"5",
    "a list": lambda content: b"[]",
    "null": lambda content: b"null",
    "100,000 brackets": lambda content: b"[" * 100_000,
    "a number of 5,000 digits": lambda content: b'{"schema_version": ' + b"9" * 5000 + b"}",
    "a folder": None,
    "missing": None,
}


def damage(path, kind):
    """Damage the file `path` in the way that `kind` names."""
    content = path.read_bytes()
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(DAMAGES[kind](content))


@pytest.fixture(params=DAMAGES, ids=str)
def kind(request):
    return request.param


def test_names_a_damaged_record(tmp_path, kind):
    path = tmp_path / "record.json"
    records.write(path, {"value": 1})
    damage(path, kind)
    assert "record.json" in message_of(lambda: records.read(path))


def test_skips_a_damaged_status_file(tmp_path, kind):
    path = tmp_path / ".status" / "finetune" / "x.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"title": "finetune Llama best_acc", "state": "running", "started": 1, "updated": 2}))
    assert len(job_status.Statuses(tmp_path).jobs) == 1
    damage(path, kind)
    assert not job_status.Statuses(tmp_path).jobs
    assert study_records.read(tmp_path, [("Llama", "best_acc")]).pairs[0].state == "waiting"


@pytest.mark.parametrize(
    "facts", [{"pid": 10**30}, {"pid": -1}, {"title": " "}, {"title": ["x"]}, {"reason": {"a": 1}}]
)
def test_accepts_a_status_file_with_odd_values(tmp_path, facts):
    import socket

    whole = {"title": "x", "state": "running", "started": 1, "updated": 2, "host": socket.gethostname(), "pid": 1}
    (tmp_path / ".status").mkdir()
    (tmp_path / ".status" / "x.json").write_text(json.dumps(whole | facts))
    for job in job_status.Statuses(tmp_path).jobs:
        job.describe()


def test_rebuilds_a_damaged_fingerprint_cache(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "weights").write_bytes(b"one")
    original_digest = fingerprints.file_digest(tmp_path / "weights")
    (entry,) = (tmp_path / "cache").rglob("*.json")
    damage(entry, kind)
    assert fingerprints.file_digest(tmp_path / "weights") == original_digest


def test_an_unreadable_lease_counts_as_the_whole_device(tmp_path, monkeypatch, kind):
    import fcntl

    monkeypatch.setenv(gpus.FOLDER, str(tmp_path))
    device = gpus.Device("0", "GPU-0", 80_000)
    device.folder().mkdir(parents=True)
    path = device.folder() / "1.lease"
    path.write_text("1000")
    damage(path, kind)
    if kind in ("a folder", "missing"):
        assert gpus._used(device) == (0, 0)
        return
    with open(path, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert gpus._used(device) == ({"a number": 5, "torn": 10}.get(kind, 80_000), 1)


def test_rejects_a_lease_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(gpus.FOLDER, str(tmp_path / "file"))
    monkeypatch.setenv(gpus.VISIBLE, "0")
    monkeypatch.delenv(gpus.GIVEN, raising=False)
    with pytest.raises(CoppiceError, match=gpus.FOLDER), gpus.lease(1):
        pytest.fail("there is no such lease")


def test_names_the_lock_of_a_candidate_that_is_a_folder(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "candidate")
    records.write(folder / "pruning.json", {"weights_fingerprint": "another", "recipe": None, "origin": str(folder)})
    (folder / ".weights.lock").mkdir()
    assert ".weights.lock" in message_of(lambda: candidates.ensure(folder))


def test_names_the_key_of_a_damaged_task_definition(tmp_path, kind):
    path = tmp_path / "mine.yaml"
    path.write_text("task: mine\ndataset_path: json\nmetric_list:\n  - metric: acc\n")
    zero_shot = {"include_path": str(tmp_path), "tasks": ["mine"]}
    config = MODEL | {"evaluate": {"zero_shot": zero_shot}, "datasets": {"mine": {"path": "a/b"}}}
    assert settings.load(config)
    settings.registry.tasks_in.cache_clear()
    if kind == "torn":  # half of this file is valid YAML; the next test covers invalid YAML
        return
    damage(path, kind)
    assert "include_path" in message_of(lambda: settings.load(config))


@pytest.mark.parametrize("text", ["a: [", "x: {", "\tb: 1", "include: nowhere.yaml", "include: [a.yaml, {}]"])
def test_rejects_an_invalid_task_definition_before_any_job(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(f"task: mine\n{text}\n")
    zero_shot = {"include_path": str(tmp_path), "tasks": ["mine"], "metric": {"mine": "acc"}}
    message = message_of(lambda: settings.load(MODEL | {"evaluate": {"zero_shot": zero_shot}}))
    assert "include_path" in message and ".yaml" in message


ROWS = [{"text": f"row {i}", "label": i} for i in range(20)]


def data_file(form):
    """Return the content of a data file of 20 rows, and its name."""
    if form == "parquet":
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
        return sink.getvalue().to_pybytes(), "test.parquet"
    lines = {
        "json": [json.dumps(row) for row in ROWS],
        "csv": ["text,label", *(f"{row['text']},{row['label']}" for row in ROWS)],
        "text": [row["text"] for row in ROWS],
    }[form]
    return "".join(f"{line}\n" for line in lines).encode(), {
        "json": "test.jsonl",
        "csv": "test.csv",
        "text": "test.txt",
    }[form]


def prepare(folder, form, **more):
    entry = {"path": str(folder), "format": form, "columns": {}, "splits": {"report": "test"}, "uses": ["text"]} | more
    data.prepare("mine", entry, folder / "out", needs_selection=False)


@pytest.mark.parametrize("form", ["json", "csv", "parquet", "text"])
def test_names_the_dataset_of_a_damaged_data_file(tmp_path, form, kind):
    content, name = data_file(form)
    (tmp_path / name).write_bytes(content)
    damage(tmp_path / name, kind)
    # Most bytes are valid lines of text, and a truncated CSV file does not show that rows are missing.
    if (form == "text" and kind not in ("empty", "garbled", "UTF-16", "a folder", "missing")) or (form, kind) == (
        "csv",
        "torn",
    ):
        return
    message = message_of(lambda: prepare(tmp_path, form))
    assert "datasets.mine" in message
    assert not (tmp_path / "out/dataset.json").exists()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('{"text": 5}', "text holds int64"),
        ('{"text": ["a"]}', "text holds lists"),
        ('{"text": {"a": 1}}', "text holds lists or mappings"),
        ('{"text": "a"}\n{"text": null}', "row 1 of its report rows"),
        ('{"other": "a"}', "lack the column text"),
        ("[1, 2]", "text holds int64"),
        ('{"text": "a\\ud800"}', "cannot be read as json"),
    ],
)
def test_rejects_rows_that_are_not_text(tmp_path, lines, words):
    (tmp_path / "test.jsonl").write_text(lines + "\n")
    assert words in message_of(lambda: prepare(tmp_path, "json"))


def test_rejects_text_in_another_encoding(tmp_path):
    (tmp_path / "test.jsonl").write_bytes('{"text": "Grüße"}\n'.encode("latin-1"))
    assert "test.jsonl" in message_of(lambda: prepare(tmp_path, "json"))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"instruction": 5, "output": "b"}, "instruction holds int64"),
        ({"prompt": "a", "completion": ["b"]}, "completion holds lists"),
        ({"question": "a"}, "its rows need the columns"),
    ],
)
def test_rejects_rows_that_cannot_be_trained_on(tmp_path, row, words):
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    assert words in message_of(lambda: prepare(tmp_path, "json", splits={"train": "train"}, uses=["training"]))


def test_accepts_values_that_json_cannot_express(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"text": "a", "score": NaN, "at": "2020-01-01T00:00:00"}\n')
    prepare(tmp_path, "json")
    assert data.texts(tmp_path / "out/dataset.json", "report")[:] == ["a"]


def test_names_a_truncated_compressed_file(tmp_path):
    (tmp_path / "ptb.test.txt.gz").write_bytes(gzip.compress(b"one\ntwo\n" * 50)[:-15])
    assert "ptb.test.txt.gz" in message_of(lambda: prepare(tmp_path, "text"))


def test_rejects_a_task_row_without_an_answer(tmp_path):
    rows = [{"goal": "a", "sol1": "b", "sol2": "c", "label": label} for label in (0, None)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"path": str(tmp_path), "format": "json", "splits": {"report": "test"}}
    message = message_of(lambda: data.prepare("piqa", entry, tmp_path / "out", False, data.TASK_COLUMNS["piqa"]))
    assert "row 1 of its report rows (from 0) has no label" in message


@pytest.mark.parametrize("name", ["dataset.json", "report.parquet"])
def test_names_a_damaged_file_of_a_prepared_dataset(tmp_path, kind, name):
    (tmp_path / "test.txt").write_text("one\ntwo\n")
    prepare(tmp_path, "text")
    damage(tmp_path / "out" / name, kind)
    assert name in message_of(lambda: data.texts(tmp_path / "out/dataset.json", "report"))


def evaluation(folder):
    """Write an evaluation's folder with the samples of one task; return the path of the samples."""
    rows = [{"doc_id": i, "doc_hash": str(i), "correct": i % 2 / 1} for i in range(40)]
    records.write(folder / "evaluation_results.json", {"samples": stored_samples.write_samples(folder, {"piqa": rows})})
    return folder / "samples" / "piqa.parquet"


def test_names_damaged_samples_and_their_record(tmp_path, kind):
    path = evaluation(tmp_path)
    [(correct,), _] = stored_samples.row_values([tmp_path, tmp_path], "piqa", ["correct"], "again")
    assert correct.sum() == 20
    damage(path, kind)
    message = message_of(lambda: stored_samples.row_values([tmp_path, tmp_path], "piqa", ["correct"], "again"))
    assert "piqa.parquet" in message and "evaluation_results.json" in message


def test_names_unreadable_samples_with_a_matching_digest(tmp_path, kind):
    path = evaluation(tmp_path)
    damage(path, kind)
    if kind not in ("a folder", "missing"):
        digest = fingerprints.content_digest(path)
        records.write(tmp_path / "evaluation_results.json", {"samples": {"piqa": digest}})
        assert "piqa.parquet: cannot be read" in message_of(lambda: stored_samples.samples(tmp_path, "piqa"))


@pytest.fixture(scope="module")
def whole(tiny_checkpoint):
    return tiny_checkpoint("llama")


@pytest.fixture
def checkpoint(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "checkpoint")


def register(folder):
    """Register a user's folder as a candidate and as a dense model; return the message of each.

    A study does this before it computes on the folder.
    """
    dense, output = folder.parent / "dense.json", folder.parent / "candidate"
    records.write(dense, {"path": "/gone", "weights_fingerprint": "0" * 64})
    return [
        message_of(lambda: candidates.import_checkpoint({"model": "A", "candidate": "x"}, folder, {}, dense, output)),
        message_of(
            lambda: fetching.fetch_model(
                "A", {"kind": "local", "path": str(folder)}, None, folder.parent / "model.json"
            )
        ),
    ]


# files that transformers does not need
OPTIONAL = {"generation_config.json", "tokenizer_config.json"}


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_registration_names_a_damaged_file_of_a_checkpoint(checkpoint, name, kind):
    damage(checkpoint / name, kind)
    absent = kind in ("a folder", "missing")
    if name in OPTIONAL and absent:
        return
    for message in register(checkpoint):
        assert str(checkpoint) in message and (absent or name in message)
    if name in ("config.json", "model.safetensors"):
        assert str(checkpoint) in message_of(lambda: models.load(models.Source(str(checkpoint))))
        if name == "config.json":
            estimates.shape_of(checkpoint / name)
            local = {"models": {"A": {"base": str(checkpoint), "family": "llama"}}}
            assert "models.A.base" in message_of(lambda: settings.load(local))


HEADER = b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**11) + b"{}",
        struct.pack("<Q", 99_000_000) + b"{}",
        struct.pack("<Q", len(HEADER)) + HEADER,
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        b"\1\0",
    ],
    ids=["a header of 2^63 bytes", "of 100 GB", "of 99 MB", "a tensor of 4 TB", "brackets", "two bytes"],
)
def test_rejects_an_oversized_header_without_allocating_memory(checkpoint, content):
    import resource

    (checkpoint / "model.safetensors").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert all("model.safetensors" in message for message in register(checkpoint))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KB


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"hidden_size": 10**12}, "embedding of the weights is (128, 32)"),
        ({"vocab_size": 10**10}, "embedding of the weights is (128, 32)"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_hidden_layers": 10**9}, "layer 4 has no tensor"),
        ({"num_hidden_layers": 1}, "the weights have a layer 3"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "config.json says"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"intermediate_size": 10**12}, "config.json says"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
        ({"model_type": 5}, "model_type is 5"),
    ],
    ids=str,
)
def test_registration_rejects_a_configuration_that_contradicts_the_weights(checkpoint, changes, words):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | changes))
    assert all(words in message for message in register(checkpoint))
    assert words in message_of(lambda: models.load(models.Source(str(checkpoint))))


@pytest.mark.parametrize(
    "key", ["hidden_act", "rms_norm_eps", "dtype", "pad_token_id", "rope_parameters", "model_type"]
)
def test_loads_or_rejects_any_other_value_of_a_configuration(checkpoint, key):
    config = json.loads((checkpoint / "config.json").read_text())
    for value in ("nope", 10**9, [], {"rope_type": "nope"}):
        (checkpoint / "config.json").write_text(json.dumps(config | {key: value}))
        message_of(lambda: models.load(models.Source(str(checkpoint))))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": "../checkpoint/model.safetensors"}}, "not in its folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "not in its folder"),
        ({"weight_map": {"a": "model-00002-of-00002.safetensors"}}, "does not exist"),
        ({"weight_map": {"a": 5}}, "no weight_map"),
        ({}, "no weight_map"),
    ],
)
def test_rejects_an_index_of_files_that_are_missing_or_in_another_folder(checkpoint, index, words):
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert all(words in message for message in register(checkpoint))
    assert words in message_of(lambda: models.load(models.Source(str(checkpoint))))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_names_the_folder_of_a_damaged_adapter(adapter, kind, name):
    base, folder = adapter
    damage(folder / name, kind)
    assert str(folder) in message_of(lambda: models.load_adapter(models.load(models.Source(str(base))), folder))


@pytest.fixture
def adapter(whole, tmp_path):
    """Return (checkpoint folder, folder of an adapter that changes the model)."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(models.load(models.Source(str(whole))), LoraConfig(target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    return whole, tmp_path / "adapter"


@given(st.binary(max_size=300))
def test_every_reader_accepts_or_rejects_any_bytes(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "record.json"):
        (folder / name).write_bytes(content)
    message_of(lambda: files.check(folder))
    message_of(lambda: files.check_tokenizer(folder))
    assert message_of(lambda: records.read(folder / "record.json"))
    estimates.shape_of(folder / "config.json")
    job_status._read(folder / "record.json")


@pytest.fixture
def public_checkpoint(checkpoint):
    """Return a checkpoint in a folder that every user may read; the temporary folders of root are closed to others."""
    with world_writable_folder() as folder:
        copy = Path(shutil.copytree(checkpoint, folder / "checkpoint"))
        copy.chmod(0o777)
        for path in copy.iterdir():
            path.chmod(0o644)
        yield copy


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_names_a_file_of_a_checkpoint_without_read_permission(public_checkpoint, name):
    (public_checkpoint / name).chmod(0)
    with without_root():
        for message in register(public_checkpoint):
            assert str(public_checkpoint) in message and name in message and "ermission" in message


def test_names_a_record_or_folder_without_read_permission(public_checkpoint):
    record = public_checkpoint / "record.json"
    records.write(record, {})
    record.chmod(0)
    with without_root():
        assert str(record) in message_of(lambda: records.read(record))
    public_checkpoint.chmod(0)
    with without_root():
        assert all(str(public_checkpoint) in message for message in register(public_checkpoint))


@pytest.mark.parametrize("form", ["json", "csv", "parquet", "text"])
def test_names_a_data_file_without_read_permission(form):
    content, name = data_file(form)
    with world_writable_folder() as folder:
        (folder / name).write_bytes(content)
        prepare(folder, form)
        (folder / "out").chmod(0o777)
        (folder / name).chmod(0)
        with without_root():
            message = message_of(lambda: prepare(folder, form))
        assert "datasets.mine" in message and name in message and "ermission" in message


def test_names_a_configuration_or_table_without_read_permission():
    settings.load(MODEL)
    with world_writable_folder() as folder:
        for name in ("study.yaml", "mine.csv"):
            (folder / name).write_bytes(b"seed: 1\n")
            (folder / name).chmod(0)
        with without_root():
            readers = (lambda: config_files.read(folder / "study.yaml"), lambda: load_table(folder))
            for message in map(message_of, readers):
                assert str(folder) in message and "ermission" in message
