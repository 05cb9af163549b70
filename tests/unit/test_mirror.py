"""Folders of configs that show the results of candidates, and the results that an earlier layout left there."""

import shutil

import pytest

from coppice.core import mirror, records
from coppice.stages import select
from coppice.study import earlier_layout

TRAINED = "results/by_candidate/M/{}/finetuned"


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """Work in a folder of its own, because records hold relative paths."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(inside, candidate, loss=1.0, **more):
    """Write what a training of a candidate leaves, and return its folder."""
    folder = inside / TRAINED.format(candidate)
    (folder / "checkpoint-4").mkdir(parents=True)
    (folder / "checkpoint-4/optimizer.pt").write_text(candidate)
    (folder / "best").symlink_to("checkpoint-4")
    for name in ("adapter_model.safetensors", "training_log.txt", ".training_key.json"):
        (folder / name).write_text(f"{name} of {candidate}")
    for name in more.get("extra", ()):
        (folder / name).write_text(name)
    for name in ("training_state.json", "finetuning_config.json"):
        records.write(folder / name, {"model": "M", "candidate": candidate, "validation_loss": loss})
    return folder


def selected(inside, **choices):
    """Write the selections of configs (config -> candidate) and return config -> path."""
    paths = {config: inside / f"results/for_finetuning/M/{config}/selection_info.json" for config in choices}
    for config, path in paths.items():
        records.write(path, {"model": "M", "config": config, "candidate": choices[config]})
    return paths


def linked(inside, config, source, before=()):
    folder = inside / f"results/finetuned/M/{config}_finetuned"
    select.link({"model": "M", "config": config}, source / "finetuning_config.json", folder, before)
    return folder


def test_the_folder_of_a_config_has_every_file_of_its_candidates_training(inside):
    source = trained(inside, "a")
    folder = linked(inside, "best_acc", source)
    visible = {path.name for path in source.iterdir() if not path.name.startswith(".")}
    assert {path.name for path in folder.iterdir()} == visible | {mirror.ORIGIN}
    assert (folder / "best/optimizer.pt").read_text() == "a"
    for name in ("training_state.json", "finetuning_config.json"):
        assert not (folder / name).is_symlink()
        record = records.read(folder / name)
        assert (record["config"], record["candidate"], record["validation_loss"]) == ("best_acc", "a", 1.0)
        assert "reused_from" not in record and "config" not in records.read(source / name)


def test_the_second_config_with_a_candidate_names_the_first(inside):
    source = trained(inside, "a")
    chosen = selected(inside, best_acc="a", best_ppl="b", again="a")
    folder = linked(inside, "again", source, [chosen["best_acc"], chosen["best_ppl"]])
    assert records.read(folder / "finetuning_config.json")["reused_from"] == "best_acc"


def test_another_choice_replaces_the_links_and_leaves_both_trainings_as_they_are(inside):
    first, second = trained(inside, "a", extra=["README.md"]), trained(inside, "b", loss=2.0)
    linked(inside, "best_acc", first)
    folder = linked(inside, "best_acc", second)
    assert (folder / "adapter_model.safetensors").read_text().endswith("of b")
    assert records.read(folder / "finetuning_config.json")["validation_loss"] == 2.0
    assert not (folder / "README.md").is_symlink() and (first / "README.md").exists()
    assert (first / "adapter_model.safetensors").read_text().endswith("of a")


def test_links_hold_in_a_copy_of_the_results(inside):
    linked(inside, "best_acc", trained(inside, "a"))
    copied = shutil.copytree(inside / "results", inside / "elsewhere/copy", symlinks=True)
    shutil.rmtree(inside / "results")
    folder = copied / "finetuned/M/best_acc_finetuned"
    assert all(path.exists() for path in folder.iterdir())
    assert all(path.resolve().is_relative_to(copied) for path in folder.iterdir())


def test_keeps_a_folder_that_is_in_the_way_of_a_link(inside):
    folder = inside / "results/finetuned/M/best_acc_finetuned"
    (folder / "checkpoint-4").mkdir(parents=True)
    (folder / "checkpoint-4/optimizer.pt").write_text("of an earlier training")
    linked(inside, "best_acc", trained(inside, "a"))
    assert (folder / "checkpoint-4/optimizer.pt").read_text() == "a"
    assert (folder / "superseded-checkpoint-4/optimizer.pt").read_text() == "of an earlier training"


def test_a_job_that_writes_its_own_results_does_not_write_through_links(inside):
    """An arm of an ablation whose training was another arm's, and that now trains itself."""
    source = trained(inside, "a")
    folder = linked(inside, "best_acc", source)
    (folder / "own").symlink_to("finetuning_config.json")
    mirror.clear(folder)
    assert {path.name for path in folder.iterdir()} == {"training_state.json", "finetuning_config.json", "own"}


def test_a_remedy_names_the_record_of_the_candidate(inside):
    source = trained(inside, "a")
    record = linked(inside, "best_acc", source) / "finetuning_config.json"
    assert mirror.origin_of(record) == f"{TRAINED.format('a')}/finetuning_config.json"
    assert mirror.origin_of(source / "finetuning_config.json") == str(source / "finetuning_config.json")


def test_deletes_the_records_of_a_config_whose_candidates_results_were_deleted(inside):
    """Snakemake would not notice that the candidate's are missing."""
    first, second = trained(inside, "a"), trained(inside, "b")
    folders = [linked(inside, "best_acc", first), linked(inside, "best_ppl", second)]
    shutil.rmtree(first)
    select.forget_stale([*folders, inside / "results/finetuned/M/unknown_finetuned"])
    assert [(folder / "finetuning_config.json").exists() for folder in folders] == [False, True]


# Results of the earlier layout, in which each config had its own training


def earlier(inside, config, weights, **more):
    """Write what the earlier version left of a config's training, and return its folder."""
    folder = inside / f"results/finetuned/M/{config}_finetuned"
    (folder / "checkpoint-4").mkdir(parents=True)
    (folder / "seed-7").mkdir()
    (folder / ".training_key.json").write_text(config)
    record = {"model": "M", "config": config, "provenance": {"fingerprints": {"weights": weights}}}
    records.write(folder / "finetuning_config.json", record | more)
    return folder


@pytest.fixture
def candidate(inside):
    """Return the path of a candidate's record, whose weights have the fingerprint `w`."""
    path = inside / "results/candidates/M/a/pruning.json"
    records.write(path, {"model": "M", "candidate": "a", "weights_fingerprint": "w"})
    return path


def test_takes_over_the_training_that_an_earlier_version_left_for_a_config(inside, candidate):
    other, folder = earlier(inside, "another", "v"), earlier(inside, "best_acc", "w")
    earlier_layout.adopt("training", candidate, TRAINED.format("a"))
    source = inside / TRAINED.format("a")
    assert (source / ".training_key.json").read_text() == "best_acc" and (source / "checkpoint-4").is_dir()
    assert [path.name for path in folder.iterdir()] == ["seed-7"]  # another training, with its own job
    assert (other / "finetuning_config.json").exists()


def test_takes_nothing_over_if_the_candidate_has_results_of_its_own(inside, candidate):
    source, folder = trained(inside, "a"), earlier(inside, "best_acc", "w")
    earlier_layout.adopt("training", candidate, TRAINED.format("a"))
    assert (folder / "finetuning_config.json").exists()
    assert (source / ".training_key.json").read_text().endswith("of a")


def test_takes_no_results_of_other_weights_over(inside, candidate):
    folder = earlier(inside, "best_acc", "v")
    earlier_layout.adopt("training", candidate, TRAINED.format("a"))
    assert (folder / "checkpoint-4").is_dir() and not (inside / TRAINED.format("a")).exists()
