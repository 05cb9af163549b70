"""Selection: the best by the criterion, ties by size, the user's own numbers if there are any, links and no copies."""

import csv
import json
import math
import shutil
from pathlib import Path

import pandas
import pytest

from coppice import models
from coppice.core import fingerprints, records
from coppice.core.errors import CheckpointError, CoppiceError
from coppice.stages import select
from coppice.stages.prune import candidates
from coppice.stages.select import margins, ranking
from coppice.stats import metrics, pareto, stored_samples


def scored(**values):
    return {name: {"metrics": {"average_acc": acc}, "parameters": size} for name, (acc, size) in values.items()}


def by(metric, mode, **bounds):
    """Return a criterion as the configuration resolves it."""
    where = {name: {"min": None, "max": None} | ends for name, ends in bounds.items()}
    shape = {"metric": metric, "mode": mode, "pareto": None, "metrics": None, "where": where, "split": "selection"}
    return shape | {"words": f"{mode} {metric}"}


KNEE = by(None, None) | {"pareto": "knee", "metrics": {"average_acc": "max", "ppl": "min"}, "words": "knee"}


def order(entries, criterion):
    return [name for name, _ in ranking.rank(entries, criterion)]


def test_the_highest_wins_for_max_and_the_lowest_for_min():
    entries = scored(a=(0.5, 10), b=(0.7, 10), c=(0.6, 10))
    assert order(entries, by("average_acc", "max")) == ["b", "c", "a"]
    assert order(entries, by("average_acc", "min")) == ["a", "c", "b"]


def test_ties_go_to_fewer_parameters_and_then_to_the_name():
    assert order(scored(b=(0.5, 10), a=(0.5, 10), c=(0.5, 9)), by("average_acc", "max")) == ["c", "a", "b"]


def test_names_a_candidate_without_the_metric():
    with pytest.raises(CoppiceError, match=r"candidate a: .*ppl\.ptb"):
        ranking.rank(scored(a=(0.5, 1)), by("ppl.ptb", "min"))


def points(**values):
    return {name: {"metrics": {"average_acc": acc, "ppl": ppl}, "parameters": 1} for name, (acc, ppl) in values.items()}


def test_the_pareto_front_of_a_worked_example():
    accuracy, perplexity = [0.5, 0.6, 0.4, 0.6, float("nan")], [10, 20, 30, 25, 5]
    assert pareto.pareto(accuracy, perplexity) == [True, True, False, False, False]


def test_the_knee_is_the_point_of_the_front_farthest_from_the_line_between_its_ends():
    """In units of the front, `bend` is at (0.8, 0.2), 0.6 / sqrt(2) from the diagonal, and `near` at (0.9, 0.6)."""
    entries = points(fluent=(0.4, 10), near=(0.58, 22), bend=(0.56, 14), sharp=(0.6, 30), beaten=(0.5, 25))
    found = ranking.rank(entries, KNEE)
    assert [name for name, _ in found] == ["bend", "near", "fluent", "sharp"]
    assert found[0][1] == pytest.approx(0.6 / 2**0.5) and found[1][1] == pytest.approx(0.3 / 2**0.5)
    upside_down = KNEE | {"metrics": {"ppl": "min", "average_acc": "max"}}
    assert order(entries, upside_down)[0] == "bend"


def test_a_front_of_two_has_no_knee_and_the_smaller_model_wins():
    entries = points(a=(0.5, 10), b=(0.6, 20))
    entries["b"]["parameters"] = 0.5
    assert order(entries, KNEE) == ["b", "a"]


def test_leaves_out_and_names_candidates_outside_the_bounds():
    entries = scored(large=(0.7, 100), small=(0.5, 10), tiny=(0.3, 1))
    where = by("average_acc", "max", parameters={"max": 50}, average_acc={"min": 0.5})["where"]
    left, outside = ranking.within_bounds(entries, where)
    assert left == ["small"]
    assert outside["large"] == "parameters 100, at most 50 is asked for" and "at least 0.5" in outside["tiny"]
    assert ranking.within_bounds(scored(big=(0.7, 5 * 10**9)), by("", "", parameters={"max": 6.0e9})["where"])[0]
    with pytest.raises(CoppiceError, match=r"no candidate.*bounds.*large.*tiny"):
        ranking.within_bounds(entries, by("average_acc", "max", parameters={"max": 0})["where"])


def write_evaluation(folder, right, losses):
    """Write the parts of a candidate's evaluation that margins read, for one task and one text."""
    frame = pandas.DataFrame({"doc_id": range(len(right)), "doc_hash": "h", "correct": right})
    (folder / "samples").mkdir(parents=True)
    frame.to_parquet(folder / "samples/piqa.parquet")
    digest = fingerprints.content_digest(folder / "samples/piqa.parquet")
    same = {"provenance": {"fingerprints": {"weights": folder.name}}}
    text = {"value": math.exp(sum(losses) / len(losses))}
    tasks = {"zero_shot": {"piqa": {"value": sum(right) / len(right)}}, "average_acc": sum(right) / len(right)}
    evaluation = same | {"samples": {"piqa": digest}, "perplexity": {"wikitext2": text}} | tasks
    records.write(folder / "evaluation_results.json", evaluation)
    windows = [{"nll_per_token": loss, "tokens": 10} for loss in losses]
    with_losses = {"wikitext2": text | {"window_losses": windows}}
    records.write(folder / "ppl_results.json", same | {"perplexity": with_losses})
    measured = {metric.key: metric for metric in metrics.found_in(evaluation)}
    return {"evaluation": str(folder), "measured": measured, "given": {}}


def test_a_given_perplexity_applies_to_every_text_and_acc_to_the_average():
    found = ranking.metrics_of({"average_acc": 0.4, "perplexity": {"wikitext2": {"value": 20.0}}, "zero_shot": {}})
    assert ranking.value_of(found, "ppl.wikitext2") == 20.0 and ranking.value_of(found, "acc") == 0.4
    given = found | ranking.metrics_of(given={"ppl": 12.0, "acc": 0.5})
    assert ranking.value_of(given, "ppl.wikitext2") == 12.0 and ranking.value_of(given, "acc") == 0.5


def _interval(first, second, metric):
    return margins.of(first, second, metric)["interval"]


def test_a_margin_is_computed_on_the_items_that_both_were_scored_on(tmp_path):
    """Both lose 0.1 of accuracy: one loses ten of a hundred items, the other gains 40 and loses 50."""
    base = [1.0] * 60 + [0.0] * 40
    losses = [2 + 7 * i * i % 31 / 31 for i in range(30)]
    mean = sum(losses) / 30
    first = write_evaluation(tmp_path / "first", base, losses)
    steady = write_evaluation(tmp_path / "steady", [1.0] * 50 + [0.0] * 50, [loss + 0.1 for loss in losses])
    erratic = write_evaluation(tmp_path / "erratic", [0.0] * 50 + [1.0] * 10 + [1.0] * 40, losses[::-1])
    low, high = _interval(first, steady, "average_acc")
    assert low < -0.1 < high < 0
    low, high = _interval(first, erratic, "average_acc")
    assert low < 0 < high
    low, high = _interval(first, steady, "ppl.wikitext2")
    assert 0 < low < math.exp(mean + 0.1) - math.exp(mean) < high
    assert margins.of(first, steady, "ppl.wikitext2")["resampled"] == {
        "unit": "windows",
        "count": 30,
        "block": None,
        "note": stored_samples.OLD,
    }
    low, high = _interval(first, erratic, "ppl.wikitext2")
    assert low < 0 < high
    assert _interval(first, steady | {"given": {"acc": 0.4}}, "average_acc") is None
    assert _interval(first, steady | {"evaluation": None, "measured": {}}, "piqa") is None
    other = write_evaluation(tmp_path / "other", base, [2.0] * 7)  # another tokenizer gives other windows
    assert _interval(first, other, "ppl.wikitext2") is None
    assert _interval(first, steady, "lambada_openai") is None


def test_a_row_with_all_metrics_needs_no_scoring():
    both = {"best_acc": by("average_acc", "max"), "best_ppl": by("ppl.wikitext2", "min", parameters={"max": 9})}
    assert not select.needs_scoring({"path": "p", "given": {"acc": 0.5, "ppl": 9.0}}, both)
    assert select.needs_scoring({"path": "p", "given": {"acc": 0.5}}, both)
    assert select.needs_scoring({"path": "p", "given": {"acc": 0.5}}, {"knee": KNEE})
    assert select.needs_scoring({"method": "depth"}, both)


def take_in(path, folder, **given):
    """Register a checkpoint as the candidate `folder` of model M."""
    dense = folder.parent / "dense.json"
    records.write(dense, {"path": "/gone", "weights_fingerprint": "0" * 64})
    candidates.import_checkpoint({"model": "M", "candidate": folder.name}, path, {"acc": 0.5} | given, dense, folder)


@pytest.fixture
def two_candidates(tiny_checkpoint, tmp_path):
    """Register two checkpoints of a user, with metrics of the user's own."""
    folders = {}
    for name, acc, ppl in (("good", 0.7, 20.0), ("fluent", 0.6, 10.0)):
        path = tiny_checkpoint(seed=len(name))
        folder = tmp_path / "candidates" / name
        take_in(path, folder, acc=acc, ppl=ppl)
        folders[name] = (folder / "pruning.json", None)
    return folders


def test_chooses_by_the_users_own_numbers_and_records_that(two_candidates, tmp_path):
    for config, metric, mode, best in (("a", "average_acc", "max", "good"), ("p", "ppl.wikitext2", "min", "fluent")):
        criterion = by(metric, mode)
        select.select_best({"model": "M", "config": config}, criterion, two_candidates, tmp_path / config)
        info = records.read(tmp_path / config / "selection_info.json")
        assert info["candidate"] == best and info["metrics_from"] == "the user's table"
        assert info["runner_up"]["margin"] == pytest.approx(0.1 if config == "a" else 10.0)


def test_links_the_checkpoint_which_loads(two_candidates, tmp_path):
    criterion = by("average_acc", "max")
    select.select_best({"model": "M", "config": "a"}, criterion, two_candidates, tmp_path / "a")
    assert (tmp_path / "a/model.safetensors").is_symlink()
    assert not (tmp_path / "a/model.safetensors").readlink().is_absolute()
    assert models.parameters(models.load(models.Source(str(tmp_path / "a")))) > 0


def test_finds_the_weights_in_results_behind_a_link(tiny_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "disk/of/another/depth").mkdir(parents=True)
    (tmp_path / "study").mkdir()
    (tmp_path / "study/results").symlink_to(tmp_path / "disk/of/another/depth")
    shutil.copytree(tiny_checkpoint(), tmp_path / "study/mine")
    monkeypatch.chdir(tmp_path / "study")
    take_in(tmp_path / "study/mine", Path("results/candidates/M/c"))
    folders = {"c": ("results/candidates/M/c/pruning.json", None)}
    chosen = Path("results/for_finetuning/M/a")
    select.select_best({"model": "M", "config": "a"}, by("average_acc", "max"), folders, chosen)
    assert fingerprints.weights(chosen) == fingerprints.weights("mine")


def test_finds_the_chosen_weights_in_a_renamed_results_folder(tiny_checkpoint, tmp_path, monkeypatch):
    """A user may rename the folder of a study and go on in it, for example to add a task or a seed."""
    shutil.copytree(tiny_checkpoint(), tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    take_in(tmp_path / "mine", Path("results/candidates/M/c"))
    folders = {"c": ("results/candidates/M/c/pruning.json", None)}
    chosen = "results/for_finetuning/M/a"
    select.select_best({"model": "M", "config": "a"}, by("average_acc", "max"), folders, Path(chosen))
    Path("results").rename("{braces} of another name")
    folder = candidates.checkpoint(f"{{braces}} of another name/{chosen.partition('/')[2]}/selection_info.json")
    assert fingerprints.weights(folder) == fingerprints.weights("mine")


def test_finds_the_users_candidates_in_results_copied_to_another_depth(tiny_checkpoint, tmp_path, monkeypatch):
    shutil.copytree(tiny_checkpoint(), tmp_path / "mine")
    (tmp_path / "study").mkdir()
    monkeypatch.chdir(tmp_path / "study")
    take_in(tmp_path / "mine", Path("results/candidates/M/c"))
    folders = {"c": ("results/candidates/M/c/pruning.json", None)}
    chosen = Path("results/for_finetuning/M/a")
    select.select_best({"model": "M", "config": "a"}, by("average_acc", "max"), folders, chosen)
    shutil.copytree("results", tmp_path / "deep/er" / "results", symlinks=True)
    shutil.rmtree("results")
    monkeypatch.chdir(tmp_path / "deep/er")
    folder = candidates.checkpoint(chosen / "selection_info.json")
    assert fingerprints.weights(folder) == fingerprints.weights(tmp_path / "mine")
    (tmp_path / "mine/config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"candidate c.*Put them back"):
        candidates.ensure("results/candidates/M/c")


def test_the_summary_lists_every_candidate_and_what_was_chosen(two_candidates, tmp_path):
    criterion = by("average_acc", "max")
    select.select_best({"model": "M", "config": "best"}, criterion, two_candidates, tmp_path / "best")
    chosen = [tmp_path / "best/selection_info.json"]
    select.summarize({"M": two_candidates}, chosen, tmp_path / "candidates.tsv", tmp_path / "SUMMARY.md")
    with open(tmp_path / "candidates.tsv") as file:
        rows = {row["candidate"]: row for row in csv.DictReader(file, delimiter="\t")}
    assert rows["good"]["chosen_as"] == "best" and rows["fluent"]["chosen_as"] == ""
    assert "**best**" in (tmp_path / "SUMMARY.md").read_text()


def test_the_summary_repeats_the_warnings_of_the_scores(two_candidates, tmp_path):
    for name in two_candidates:
        scores = {"warnings": ["lm-eval's own backend scored the tasks"] if name == "good" else [], "parameters": 5}
        records.write(tmp_path / name / "evaluation_results.json", scores)
        two_candidates[name] = (two_candidates[name][0], tmp_path / name / "evaluation_results.json")
    identity = {"model": "M", "config": "best"}
    select.select_best(identity, by("average_acc", "max"), two_candidates, tmp_path / "best")
    chosen = [tmp_path / "best/selection_info.json"]
    select.summarize({"M": two_candidates}, chosen, tmp_path / "candidates.tsv", tmp_path / "SUMMARY.md")
    assert "**note**: good: lm-eval's own backend scored the tasks" in (tmp_path / "SUMMARY.md").read_text()


def test_a_column_of_the_table_does_not_replace_what_this_study_computes(two_candidates, tmp_path):
    """As when a `candidates.tsv` of another study is used as the table, with a column of paths added."""
    for pruning, _ in two_candidates.values():
        records.write(pruning, records.read(pruning) | {"given": {"parameters": "6.5B", "chosen_as": "other"}})
    counted = {name: entry["parameters"] for name, entry in select.choice.read_candidates(two_candidates).items()}
    select.summarize({"M": two_candidates}, [], tmp_path / "candidates.tsv", tmp_path / "SUMMARY.md")
    with open(tmp_path / "candidates.tsv") as file:
        rows = {row["candidate"]: row for row in csv.DictReader(file, delimiter="\t")}
    assert {name: row["parameters"] for name, row in rows.items()} == {n: str(v or "") for n, v in counted.items()}
    assert {row["chosen_as"] for row in rows.values()} == {""}


def test_rejects_a_folder_without_weights(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no weights"):
        take_in(tmp_path / "empty", tmp_path / "out")


def reconfigured(folder):
    """Change the configuration in a key that affects no tensor."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pruned_by": "nobody"}))


def in_other_shards(folder):
    models.load(models.Source(str(folder))).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("disguise", [lambda folder: None, reconfigured, in_other_shards])
def test_rejects_the_dense_model_as_a_candidate(tiny_checkpoint, tmp_path, disguise):
    dense = tiny_checkpoint()
    records.write(tmp_path / "model.json", {"path": str(dense), "weights_fingerprint": fingerprints.weights(dense)})
    copy = shutil.copytree(dense, tmp_path / "my copy")
    disguise(copy)
    with pytest.raises(CheckpointError) as raised:
        candidates.import_checkpoint(
            {"model": "M", "candidate": "c"}, copy, {}, tmp_path / "model.json", tmp_path / "out/c"
        )
    for words in (
        str(copy),
        "candidate c of model M is the dense model itself",
        "Remove its row from candidates.table",
    ):
        assert words in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changed", ["unknown words", "ids"])
def test_rejects_a_candidate_whose_tokenizer_differs_from_the_dense_models(tiny_checkpoint, tmp_path, changed):
    """As with a tokenizer of another model, or one that begins texts with BOS while the dense model's does not."""
    dense, mine = tiny_checkpoint(), shutil.copytree(tiny_checkpoint(seed=1), tmp_path / "mine")
    records.write(tmp_path / "model.json", {"path": str(dense), "weights_fingerprint": fingerprints.weights(dense)})
    content = json.loads((mine / "tokenizer.json").read_text())
    content["model"] |= {"unk_token": "w4"} if changed == "unknown words" else {}
    content["model"]["vocab"] |= {"w8": 9, "w9": 8} if changed == "ids" else {}
    (mine / "tokenizer.json").write_text(json.dumps(content))
    arguments = {"model": "M", "candidate": "c"}, mine, {}, tmp_path / "model.json", tmp_path / "out/c"
    with pytest.raises(CheckpointError, match=r"tokenizer differs.*Copy"):
        candidates.import_checkpoint(*arguments)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(dense / name, mine / name)
    candidates.import_checkpoint(*arguments)
