"""`coppice trace`: the records behind a number, and whether they agree with each other and with the files."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pandas
import pytest
from synthetic_records import Synthetic

from coppice import cli
from coppice.core import records
from coppice.planning import gathered_inputs

MODEL = {"Llama": {"variant": "base", "family": "llama", "base": "miniature/llama"}}
CONFIGS = ("best_acc",)
REPORT = "results/finetuned_evaluation/Llama/best_acc_finetuned/comparison_report.txt"


@pytest.fixture(scope="module")
def written_study(tmp_path_factory):
    """Write the records of a study of one model and config as the workflow lays them out; return the folder."""
    folder = tmp_path_factory.mktemp("written")
    with contextlib.chdir(folder):
        study = Synthetic("results", MODEL, CONFIGS).build()
        chosen = records.read(study.folder("selected", "Llama", "best_acc") / "selection_info.json")
        own = {key: chosen[key] for key in ("model", "candidate", "weights_fingerprint")}
        records.write(Path(chosen["source_path"]) / "pruning.json", own | {"settings": chosen["pruning"]})
    return folder


@pytest.fixture
def study(written_study, tmp_path, monkeypatch):
    """Return a copy of that study, which a test may change; commands run in its folder."""
    shutil.copytree(written_study, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Synthetic("results", MODEL, CONFIGS)


def traced(*words):
    """Return (exit status, result) of `coppice trace --json`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out := io.StringIO())
        status = cli.main(["trace", *words, "--json"])
    return status, json.loads(out.getvalue())


def change_record(path, **more):
    """Write the record at `path` again with other content and a valid checksum."""
    record = records.read(path)
    records.write(path, record | more)


def differing(found):
    return [f"{check['what']}: {check['detail']}" for check in found["checks"] if check["agrees"] is False]


def test_traces_a_report_to_every_record_behind_it(study):
    status, found = traced(REPORT)
    assert status == 0 and found["agrees"]
    names = [record["name"] for record in found["records"]]
    assert names[:6] == ["comparison", "dense", "pruned", "finetuned", "training", "selection"]
    training = next(record for record in found["records"] if record["name"] == "training")
    assert training["settings"]["learning_rate"] == 1e-4 and training["versions"]["torch"] and training["seed"] == 42


def test_traces_a_study_without_tasks(study, capsys):
    for stage in ("dense", "pruned", "finetuned"):
        path = study.folder(stage, "Llama", "best_acc") / "evaluation_results.json"
        change_record(path, zero_shot={}, average_acc=None)
    study.compare("Llama", "best_acc")
    assert cli.main(["trace", "Llama", "best_acc"]) == 0
    assert "ppl.wikitext2" in capsys.readouterr().out


def test_names_give_the_same_trace_as_a_path(study):
    assert traced("Llama", "best_acc") == traced(REPORT)


def test_shows_one_number_with_its_record_and_key(study):
    _, found = traced("Llama", "best_acc", "--metric", "piqa", "--stage", "pruned")
    (row,) = found["numbers"]
    record = records.read(row["record"])
    for key in row["key"].split("."):
        record = record[key]
    assert record == row["value"] and row["stage"] == "pruned"


def test_rejects_an_unknown_metric_and_suggests_a_valid_one(study, capsys):
    assert cli.main(["trace", "Llama", "best_acc", "--metric", "piqua"]) == 1
    assert "did you mean 'piqa'" in capsys.readouterr().err


def test_names_a_record_with_a_wrong_checksum(study):
    path = study.folder("pruned", "Llama", "best_acc") / "evaluation_results.json"
    path.write_text(path.read_text().replace('"average_acc": 0', '"average_acc": 1'))
    status, found = traced("Llama", "best_acc")
    assert status == 1 and any(str(path) in line and "checksum" in line for line in differing(found))


def test_names_a_number_that_differs_from_the_comparison(study):
    path = study.folder("finetuned", "Llama", "best_acc") / "evaluation_results.json"
    change_record(path, average_acc=0.5)
    status, found = traced("Llama", "best_acc")
    assert status == 1
    assert any("average_acc: shown as" in line and str(path) in line for line in differing(found))


def test_reports_an_evaluation_that_is_newer_than_its_comparison(study):
    path = study.folder("dense", "Llama") / "evaluation_results.json"
    change_record(path, provenance=records.read(path)["provenance"] | {"started": "2999-01-01T00:00:00Z"})
    status, found = traced("Llama", "best_acc")
    assert status == 1 and any("not newer than the comparison" in line for line in differing(found))


def test_reports_a_training_of_another_checkpoint(study):
    path = study.folder("trained", "Llama", "best_acc") / "finetuning_config.json"
    provenance = records.read(path)["provenance"]
    prints = provenance["fingerprints"] | {"weights": "f" * 64}
    change_record(path, provenance=provenance | {"fingerprints": prints})
    _, found = traced("Llama", "best_acc")
    assert any(line.startswith("training started from the chosen checkpoint") for line in differing(found))


@pytest.mark.parametrize("method", ["imported", "depth"])
def test_only_candidates_pruned_here_must_come_from_the_dense_model(study, method):
    dense = records.read(study.folder("dense", "Llama") / "evaluation_results.json")["provenance"]["fingerprints"]
    model = {"path": "dense", "weights_fingerprint": dense["weights"]}
    records.write("resources/models/Llama/model.json", model)
    chosen = records.read(study.folder("selected", "Llama", "best_acc") / "selection_info.json")
    path = Path(chosen["source_path"]) / "pruning.json"
    provenance = {"fingerprints": {"source": "e" * 64}}
    change_record(path, settings={"method": method}, provenance=provenance)
    status, found = traced("Llama", "best_acc")
    lines = [line for line in differing(found) if line.startswith("candidate was pruned from the dense model")]
    assert (status, len(lines)) == ((0, 0) if method == "imported" else (1, 1))
    assert "model" in [record["name"] for record in found["records"]]


def test_reports_an_edited_comparison_report(study):
    path = Path(REPORT)
    path.write_text(path.read_text().replace("piqa", "PIQA"))
    status, found = traced(REPORT)
    assert status == 1 and any("does not show what comparison.json holds" in line for line in differing(found))


def test_plain_output_has_no_colors_and_ends_with_the_verdict(study, capsys):
    assert cli.main(["trace", "Llama", "best_acc"]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and text.strip().splitlines()[-1].endswith("unknown")


def test_rejects_a_file_outside_a_study_with_a_remedy(study, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("x")
    assert cli.main(["trace", "notes.txt"]) == 1
    assert "coppice trace MODEL CONFIG" in capsys.readouterr().err
    assert cli.main(["trace", "Llama", "best_ac"]) == 1


@pytest.fixture
def reported(study):
    """Return the same study with its study report."""
    from coppice.report.study_report import csv_tables
    from coppice.report.study_report import study_records as studies

    (study.results / "report").mkdir()
    (study.results / "report/study_report.html").write_text("<html>")
    content = studies.read(study.results, study.pairs, study.models)
    for name in ("comparisons", "tasks", "candidates"):
        getattr(csv_tables, name)(content).to_csv(study.results / f"report/{name}.csv", index=False)
    return study


@pytest.mark.parametrize("target", ["results", "results/report", "results/report/study_report.html"])
def test_traces_a_whole_study_pair_by_pair(reported, target):
    status, found = traced(target)
    assert status == 0
    (pair,) = found["pairs"]
    assert pair["of"]["model"] == "Llama" and pair["agrees"]
    assert [check["detail"] for check in found["report"]] == ["1 rows", "7 rows", "5 rows"]
    assert all(check["agrees"] for check in found["report"])


@pytest.mark.parametrize(("table", "column"), [("comparisons", "average_acc_finetuned"), ("tasks", "p_holm")])
def test_names_a_number_that_only_the_study_report_holds(reported, capsys, table, column):
    path = reported.results / f"report/{table}.csv"
    frame = pandas.read_csv(path)
    frame.loc[0, column] = 0.123
    frame.to_csv(path, index=False)
    assert cli.main(["trace", "results"]) == 1
    output = capsys.readouterr().out
    assert (
        "DIFFERS" in output
        and f"{table}.csv: {column} of Llama best_acc" in output
        and "is 0.123, but the records give" in output
    )


def test_names_a_pair_that_only_the_study_report_holds_or_lacks(reported, capsys):
    path = reported.results / "report/comparisons.csv"
    text = path.read_text()
    path.write_text(text + text.splitlines()[1].replace("best_acc", "best_ppl", 1) + "\n")
    assert cli.main(["trace", "results"]) == 1
    output = capsys.readouterr().out
    assert "of Llama best_ppl" in output, output
    path.write_text(text.splitlines()[0] + "\n")
    assert cli.main(["trace", "results"]) == 0  # the pair may have been left out on purpose
    assert "report lacks Llama best_acc" in capsys.readouterr().out


def test_rejects_a_seed_for_a_whole_study(reported, capsys):
    assert cli.main(["trace", "results", "--seed", "7"]) == 1
    message = capsys.readouterr().err
    assert "--seed" in message and "name a model and config" in message


def test_traces_a_study_without_finetuned_evaluations(study):
    shutil.rmtree(study.results / "finetuned_evaluation")
    _, found = traced("results")
    assert found["pairs"][0]["of"]["config"] == "best_acc"


def test_finds_models_and_data_in_the_folders_that_records_name(study):
    rows = study.results.parent / "elsewhere/miniature/piqa/dataset.json"
    records.write(rows, {"name": "piqa"})
    gathered_inputs.gather([rows], study.results / ".gathered/report.json")
    _, found = traced(REPORT)
    assert str(rows) in [record["path"] for record in found["records"]]


def test_traces_an_arm_without_a_loss(study, tmp_path):
    arm = {"ablation": "a", "arm": "b", "seed": 1, "unfit": "does not fit", "validation_loss": None}
    records.write(tmp_path / "results/ablation/a/b/seed-1/arm.json", arm)
    status, found = traced("results/ablation/a/b/seed-1")
    assert status == 0 and found["numbers"] == []


def test_names_a_record_that_changed_after_the_report(reported, capsys):
    change_record(reported.folder("pruned", "Llama", "best_acc") / "evaluation_results.json", average_acc=0.99)
    assert cli.main(["trace", "results", "--metric", "average_acc"]) == 1
    output = capsys.readouterr().out
    assert "comparison shows the numbers of the pruned evaluation" in output
    assert "average_acc             0.99   results/pruned_evaluation" in output
