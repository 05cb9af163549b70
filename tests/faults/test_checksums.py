"""The reader of a file of any kind notices one flipped bit and names the file and the remedy."""

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
    """Flip one bit of the file `path`, by default in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 4
    path.write_bytes(content)


@pytest.fixture(scope="module")
def study():
    select = {"configs": {"c": {"metric": "piqa", "mode": "max"}}}
    return settings.load(copy.deepcopy(MODEL) | {"finetune": FINETUNE, "evaluate": EVALUATE, "select": select})


@pytest.fixture(scope="module")
def small_study(study, tiny_checkpoint, tmp_path_factory):
    """Return a folder with a small model, data, a training and its evaluation, all made by the package itself."""
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_checkpoint("llama"), root / "model")
    records.write(
        root / "model.json", {"path": str(root / "model"), "weights_fingerprint": weights_fingerprint(root / "model")}
    )
    words = [f"w{3 + i}" for i in range(60)]
    rows = {
        "alpaca": {"train": [{"instruction": word, "input": "", "output": f"{word} w9"} for word in words]},
        "ptb": {"report": [{"text": " ".join(words)} for _ in range(20)]},
        "piqa": {"report": [{"goal": word, "sol1": "w4", "sol2": "w5", "label": 0} for word in words]},
    }
    for name, tables in rows.items():
        data.write(name, tables, root / name)
    train(root, study)
    evaluate_adapter(root, study)
    return root


def weights_fingerprint(folder):
    from coppice.core import fingerprints

    return fingerprints.weights(folder)


def train(root, study):
    source = models.Source(str(root / "model"))
    sets = {"alpaca": root / "alpaca" / "dataset.json"}
    how = recover.TrainingSettings.model_validate(study.finetune.model_dump())
    recover.finetune(recover.TrainingRequest({"model": "A", "config": "c"}, source, sets, how, "none", root / "tuned"))


def evaluate_adapter(root, study):
    sets = {name: root / name / "dataset.json" for name in ("ptb", "piqa")}
    identity = {"model": "A", "config": "c", "stage": "finetuned"}
    source, tuned = models.Source(str(root / "model")), root / "tuned"
    evaluate.evaluate(
        evaluate.EvaluationRequest(identity, source, study.evaluate, sets, root / "evaluated", adapter=tuned)
    )


@pytest.fixture
def study_copy(small_study, tmp_path):
    root = shutil.copytree(small_study, tmp_path / "made", symlinks=True)
    records.write(
        root / "model.json", {"path": str(root / "model"), "weights_fingerprint": weights_fingerprint(root / "model")}
    )
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
def test_detects_a_flipped_bit_in_a_record(study_copy, name):
    assert records.read(study_copy / name)
    size = (study_copy / name).stat().st_size
    for place in (10, size // 3, size // 2, size - 20):
        flip(study_copy / name, place)
        assert name.rpartition("/")[2] in message_of(lambda: records.read(study_copy / name))
        flip(study_copy / name, place)
    assert records.read(study_copy / name)


def test_detects_a_flipped_bit_in_a_prepared_dataset(study_copy):
    record = study_copy / "ptb" / "dataset.json"
    flip(study_copy / "ptb" / "report.parquet")
    message = message_of(lambda: data.texts(record, "report"))
    assert "report.parquet: the file was changed" in message and f"Delete {record} and run snakemake again" in message


def test_restores_damaged_samples_from_the_parts_of_the_evaluation(study_copy, study):
    path = study_copy / "evaluated" / "samples" / "piqa.parquet"
    whole = path.read_bytes()
    flip(path)
    message = message_of(lambda: stored_samples.row_values([study_copy / "evaluated"], "piqa", "correct", "again"))
    assert "piqa.parquet: changed after its evaluation wrote it" in message and "delete" in message
    (study_copy / "evaluated" / "evaluation_results.json").unlink()
    evaluate_adapter(study_copy, study)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_restores_a_damaged_adapter_from_its_checkpoint(study_copy, study, name):
    whole = (study_copy / "tuned" / name).read_bytes()
    flip(study_copy / "tuned" / name)
    message = message_of(lambda: evaluate_adapter(study_copy, study))
    assert f"{name}" in message and "snakemake --forcerun finetune_lora" in message
    train(study_copy, study)
    evaluate_adapter(study_copy, study)
    assert (
        study_copy / "tuned" / "adapter_model.safetensors"
    ).read_bytes() == whole or name != "adapter_model.safetensors"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_detects_a_flipped_bit_in_a_dense_model(study_copy, name):
    assert models.Source.of_record(study_copy / "model.json", {}).path == str(study_copy / "model")
    place = (study_copy / "model" / name).read_bytes().rindex(b"e") if name == "config.json" else None
    flip(study_copy / "model" / name, place)
    message = message_of(lambda: models.Source.of_record(study_copy / "model.json", {}))
    assert str(study_copy / "model") in message and "model.json" in message


def test_detects_a_flipped_bit_in_a_users_candidate(study_copy):
    """A candidate that was pruned here is pruned again: see test_candidates in tests/workflow."""
    dense = study_copy / "dense.json"
    records.write(dense, {"path": "/gone", "weights_fingerprint": "0" * 64})
    candidates.import_checkpoint(
        {"model": "A", "candidate": "x"}, study_copy / "model", {}, dense, study_copy / "candidate"
    )
    candidates.ensure(study_copy / "candidate")
    flip(study_copy / "model" / "model.safetensors")
    message = message_of(lambda: candidates.ensure(study_copy / "candidate"))
    assert str(study_copy / "model") in message and "Put them back" in message


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors", "trainer_state.json", "rng_state.pth"])
def test_detects_a_flipped_bit_in_a_training_checkpoint(study_copy, name):
    (folder,) = (study_copy / "tuned").glob("checkpoint-*")
    assert checkpoints.is_whole(folder)
    flip(folder / name)
    assert not checkpoints.is_whole(folder)


def test_computes_a_damaged_part_of_an_evaluation_again(study_copy, study):
    whole = records.read(study_copy / "evaluated" / "evaluation_results.json")
    for path in sorted((study_copy / "evaluated" / ".parts").iterdir()):
        flip(path)
    evaluate_adapter(study_copy, study)
    again = records.read(study_copy / "evaluated" / "evaluation_results.json")
    assert again["zero_shot"] == whole["zero_shot"] and again["perplexity"] == whole["perplexity"]


def test_rejects_a_record_with_another_schema_or_without_a_checksum(tmp_path):
    for content in ({"schema_version": 2, "checksum": "x"}, {"schema_version": 1}):
        (tmp_path / "a.json").write_text(json.dumps(content))
        assert "a.json" in message_of(lambda: records.read(tmp_path / "a.json"))
