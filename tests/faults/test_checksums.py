"""One bit that flips on a disk, in a file of any kind, is noticed by its reader, which names file and remedy."""

import copy
import json
import shutil

import pytest
from test_bad_configuration import MODEL, message_of

from coppice import data, models
from coppice.core import records
from coppice.stages import evaluate, recover
from coppice.stages.prune import candidates
from coppice.stages.recover.engine import checkpoints
from coppice.stats import stored_samples
from coppice.study import settings

FINETUNE = {
    "data": {"dataset": "alpaca", "val_size": 4, "cutoff_len": 32},
    "lora": {"r": 2, "dropout": 0},
    "max_steps": 2,
    "batch_size": 4,
    "warmup_steps": 0,
    "learning_rate": 0.01,
    "eval_steps": 2,
    "save_steps": 2,
}
EVALUATE = {
    "perplexity": {"datasets": ["ptb"]},
    "zero_shot": {"tasks": ["piqa"]},
    "generation": {"prompts": []},
    "cost": {"enabled": False},
}


def flip(path, place=None):
    """Flip one bit of the file `path`, by default in its middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 4
    path.write_bytes(content)


@pytest.fixture(scope="module")
def study():
    select = {"configs": {"c": {"metric": "piqa", "mode": "max"}}}
    return settings.load(copy.deepcopy(MODEL) | {"finetune": FINETUNE, "evaluate": EVALUATE, "select": select})


@pytest.fixture(scope="module")
def made(study, tiny_checkpoint, tmp_path_factory):
    """A folder with a small model, data, a training and an evaluation of what it gave, all by the study's own code."""
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_checkpoint("llama"), root / "model")
    records.write(root / "model.json", {"path": str(root / "model"), "weights_fingerprint": prints(root / "model")})
    words = [f"w{3 + i}" for i in range(60)]
    rows = {
        "alpaca": {"train": [{"instruction": word, "input": "", "output": f"{word} w9"} for word in words]},
        "ptb": {"report": [{"text": " ".join(words)} for _ in range(20)]},
        "piqa": {"report": [{"goal": word, "sol1": "w4", "sol2": "w5", "label": 0} for word in words]},
    }
    for name, tables in rows.items():
        data.write(name, tables, root / name, {}, {})
    train(root, study)
    evaluated(root, study)
    return root


def prints(folder):
    from coppice.core import fingerprints

    return fingerprints.weights(folder)


def train(root, study):
    source = models.Source(str(root / "model"))
    sets = {"alpaca": root / "alpaca" / "dataset.json"}
    recover.finetune({"model": "A", "config": "c"}, source, sets, study.finetune, "none", root / "tuned")


def evaluated(root, study):
    sets = {name: root / name / "dataset.json" for name in ("ptb", "piqa")}
    identity = {"model": "A", "config": "c", "stage": "finetuned"}
    source, tuned = models.Source(str(root / "model")), root / "tuned"
    evaluate.evaluate(identity, source, study.evaluate, sets, root / "evaluated", adapter=tuned)


@pytest.fixture
def copied(made, tmp_path):
    root = shutil.copytree(made, tmp_path / "made", symlinks=True)
    records.write(root / "model.json", {"path": str(root / "model"), "weights_fingerprint": prints(root / "model")})
    return root


RECORDS = [
    "piqa/dataset.json",
    "model.json",
    "tuned/finetuning_config.json",
    "tuned/training_state.json",
    "evaluated/evaluation_results.json",
    "evaluated/ppl_results.json",
]


@pytest.mark.parametrize("name", RECORDS)
def test_a_record(copied, name):
    assert records.read(copied / name)
    size = (copied / name).stat().st_size
    for place in (10, size // 3, size // 2, size - 20):
        flip(copied / name, place)
        assert name.rpartition("/")[2] in message_of(lambda: records.read(copied / name))
        flip(copied / name, place)
    assert records.read(copied / name)


def test_a_prepared_data_set(copied):
    record = copied / "ptb" / "dataset.json"
    flip(copied / "ptb" / "report.parquet")
    message = message_of(lambda: data.texts(record, "report"))
    assert "report.parquet: was changed" in message and f"delete {record} and run snakemake again" in message


def test_the_samples_of_an_evaluation_come_back_from_its_parts(copied, study):
    path = copied / "evaluated" / "samples" / "piqa.parquet"
    whole = path.read_bytes()
    flip(path)
    message = message_of(lambda: stored_samples.right_and_wrong([copied / "evaluated"], "piqa", "again"))
    assert "piqa.parquet: is not the file that its evaluation wrote" in message and "delete" in message
    (copied / "evaluated" / "evaluation_results.json").unlink()
    evaluated(copied, study)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_comes_back_from_its_checkpoint(copied, study, name):
    whole = (copied / "tuned" / name).read_bytes()
    flip(copied / "tuned" / name)
    message = message_of(lambda: evaluated(copied, study))
    assert f"{name}" in message and "snakemake --forcerun finetune_lora" in message
    train(copied, study)
    evaluated(copied, study)
    assert (copied / "tuned" / "adapter_model.safetensors").read_bytes() == whole or name != "adapter_model.safetensors"


def test_an_adapter_whose_record_is_of_before_checksums_is_evaluated(copied, study):
    record = records.read(copied / "tuned" / "finetuning_config.json")
    del record["trained_fingerprint"]
    records.write(copied / "tuned" / "finetuning_config.json", record)
    evaluated(copied, study)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_dense_model(copied, name):
    assert models.Source.of_record(copied / "model.json", {}).path == str(copied / "model")
    place = (copied / "model" / name).read_bytes().rindex(b"e") if name == "config.json" else None
    flip(copied / "model" / name, place)
    message = message_of(lambda: models.Source.of_record(copied / "model.json", {}))
    assert str(copied / "model") in message and "model.json" in message


def test_a_candidate_of_the_users_own(copied):
    """One that was made here is made anew: see test_candidates in tests/workflow."""
    dense = copied / "dense.json"
    records.write(dense, {"path": "/gone", "weights_fingerprint": "0" * 64})
    candidates.take_in({"model": "A", "candidate": "x"}, copied / "model", {}, dense, copied / "candidate")
    candidates.ensure(copied / "candidate")
    flip(copied / "model" / "model.safetensors")
    message = message_of(lambda: candidates.ensure(copied / "candidate"))
    assert str(copied / "model") in message and "put them back" in message


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors", "trainer_state.json", "rng_state.pth"])
def test_a_checkpoint_of_a_training(copied, name):
    (folder,) = (copied / "tuned").glob("checkpoint-*")
    assert checkpoints.is_whole(folder)
    flip(folder / name)
    assert not checkpoints.is_whole(folder)


def test_a_part_of_an_evaluation_is_computed_again(copied, study):
    whole = records.read(copied / "evaluated" / "evaluation_results.json")
    for path in sorted((copied / "evaluated" / ".parts").iterdir()):
        flip(path)
    evaluated(copied, study)
    again = records.read(copied / "evaluated" / "evaluation_results.json")
    assert again["zero_shot"] == whole["zero_shot"] and again["perplexity"] == whole["perplexity"]


def test_a_record_of_another_schema_or_without_a_checksum_is_told(tmp_path):
    for content in ({"schema_version": 2, "checksum": "x"}, {"schema_version": 1}):
        (tmp_path / "a.json").write_text(json.dumps(content))
        assert "a.json" in message_of(lambda: records.read(tmp_path / "a.json"))
