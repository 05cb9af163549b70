"""Selection: the best by the criterion, ties by size, the user's numbers where there are some, links and no copies."""

import csv

import pytest

from coppice import candidates, records, selection
from coppice.errors import CheckpointError, CoppiceError


def scored(**values):
    return {name: {"metrics": {"average_acc": acc}, "parameters": size} for name, (acc, size) in values.items()}


def test_the_highest_wins_for_max_and_the_lowest_for_min():
    entries = scored(a=(0.5, 10), b=(0.7, 10), c=(0.6, 10))
    assert selection.rank(entries, "average_acc", "max") == ["b", "c", "a"]
    assert selection.rank(entries, "average_acc", "min") == ["a", "c", "b"]


def test_ties_go_to_fewer_parameters_and_then_to_the_name():
    assert selection.rank(scored(b=(0.5, 10), a=(0.5, 10), c=(0.5, 9)), "average_acc", "max") == ["c", "a", "b"]


def test_a_candidate_without_the_metric_is_named():
    with pytest.raises(CoppiceError, match=r"candidate a .* ppl\.ptb"):
        selection.rank(scored(a=(0.5, 1)), "ppl.ptb", "min")


def test_a_row_that_has_all_that_is_asked_for_needs_no_scoring():
    criteria = {"best_acc": {"metric": "average_acc"}, "best_ppl": {"metric": "ppl.wikitext2"}}
    assert not selection.needs_scoring({"path": "p", "given": {"acc": 0.5, "ppl": 9.0}}, criteria)
    assert selection.needs_scoring({"path": "p", "given": {"acc": 0.5}}, criteria)
    assert selection.needs_scoring({"method": "depth"}, criteria)


@pytest.fixture
def two_candidates(tiny_checkpoint, tmp_path):
    """Two checkpoints of a user's, taken in with numbers of their own."""
    folders = {}
    for name, acc, ppl in (("good", 0.7, 20.0), ("fluent", 0.6, 10.0)):
        path = tiny_checkpoint(seed=len(name))
        folder = tmp_path / "candidates" / name
        candidates.take_in({"model": "M", "candidate": name}, path, {"acc": acc, "ppl": ppl}, folder)
        folders[name] = (folder / "pruning.json", None)
    return folders


def test_two_criteria_choose_by_the_users_own_numbers_and_say_so(two_candidates, tmp_path):
    for config, metric, mode, best in (("a", "average_acc", "max", "good"), ("p", "ppl.wikitext2", "min", "fluent")):
        criterion = {"metric": metric, "mode": mode, "split": "selection"}
        selection.select_best({"model": "M", "config": config}, criterion, two_candidates, tmp_path / config)
        info = records.read(tmp_path / config / "selection_info.json")
        assert info["candidate"] == best and info["metrics_from"] == "the user's table"
        assert info["runner_up"]["margin"] == pytest.approx(0.1 if config == "a" else 10.0)


def test_the_checkpoint_is_linked_and_loads(two_candidates, tmp_path):
    from coppice import models

    criterion = {"metric": "average_acc", "mode": "max", "split": "selection"}
    selection.select_best({"model": "M", "config": "a"}, criterion, two_candidates, tmp_path / "a")
    assert (tmp_path / "a/model.safetensors").is_symlink()
    assert not (tmp_path / "a/model.safetensors").readlink().is_absolute()
    assert models.parameters(models.load(models.Source(str(tmp_path / "a")))) > 0


def test_the_summary_lists_every_candidate_and_what_was_chosen(two_candidates, tmp_path):
    criterion = {"metric": "average_acc", "mode": "max", "split": "selection"}
    selection.select_best({"model": "M", "config": "best"}, criterion, two_candidates, tmp_path / "best")
    chosen = [tmp_path / "best/selection_info.json"]
    selection.summarize({"M": two_candidates}, chosen, tmp_path / "candidates.tsv", tmp_path / "SUMMARY.md")
    with open(tmp_path / "candidates.tsv") as file:
        rows = {row["candidate"]: row for row in csv.DictReader(file, delimiter="\t")}
    assert rows["good"]["chosen_as"] == "best" and rows["fluent"]["chosen_as"] == ""
    assert "**best**" in (tmp_path / "SUMMARY.md").read_text()


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no weights"):
        candidates.take_in({"model": "M", "candidate": "c"}, tmp_path / "empty", {}, tmp_path / "out")
