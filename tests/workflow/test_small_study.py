"""The small study, run for real by the README's command: what it writes, what a second run does, how others use it."""

import json
from pathlib import Path

import pytest
import yaml

from coppice.core import mirror
from tests.study.checkout import STUDY, TARGETS, planned_jobs

REPORT = "results/finetuned_evaluation/{}/{}_finetuned/comparison_report.txt"
PAIRS = [(model, config) for model in ("Mistral", "Qwen") for config in ("best_acc", "best_ppl")]
EVALUATION = {"model", "config", "stage", "perplexity", "zero_shot", "average_acc", "parameters", "provenance"}


def test_writes_a_report_for_every_config(finished):
    for model, config in PAIRS:
        text = (finished.folder / REPORT.format(model, config)).read_text()
        assert "wikitext2" in text and "piqa" in text and "mean" in text
        assert max(map(len, text.splitlines())) <= 100
    page = (finished.folder / "results/report/study_report.html").read_text()
    assert all(name in page for pair in PAIRS for name in pair)


def test_ends_with_a_table_of_the_recoveries(finished):
    rows = {tuple(line.split()[:2]) for line in finished.output.splitlines() if line.split()[-1:] == ["done"]}
    assert rows >= set(PAIRS) and "Reports: results/report/" in finished.output


def test_every_evaluation_has_the_fields_of_schema_1(finished):
    results = finished.folder / "results"
    found = sorted(results.glob("*_evaluation/**/evaluation_results.json"))
    stages = [json.loads(path.read_text())["stage"] for path in found if "candidate_evaluation" not in str(path)]
    assert sorted(stages) == ["dense"] * 2 + ["finetuned"] * 4 + ["pruned"] * 4
    for path in found:
        record = json.loads(path.read_text())
        assert record["schema_version"] == 1
        missing = EVALUATION - set(record) - ({"config"} if record["stage"] == "candidate" else set())
        assert not missing, path
        assert {"metric", "value", "stderr", "n", "version", "acc", "acc_norm", "engine"} <= set(
            record["zero_shot"]["piqa"]
        )
        assert (path.parent / "samples/piqa.parquet").exists() and (path.parent / "ppl_results.json").exists()


def test_the_chosen_checkpoint_is_linked_and_loads_in_plain_transformers(finished):
    from transformers import AutoModelForCausalLM

    folder = finished.folder / "results/for_finetuning/Mistral/best_acc"
    assert (folder / "model.safetensors").is_symlink()
    info = json.loads((folder / "selection_info.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == info["parameters"]
    assert info["candidate"] in info["candidates_considered"] and info["runner_up"]["margin"] >= 0


def test_each_arm_of_an_ablation_is_measured_with_the_adapter_that_it_trained(finished):
    arms = sorted((finished.folder / "results/ablation/arms").glob("*/seed-42"))
    measured = [json.loads((arm / "report/evaluation_results.json").read_text()) for arm in arms]
    trained = [json.loads((arm / "finetuning_config.json").read_text())["trained_fingerprint"] for arm in arms]
    assert [record["provenance"]["fingerprints"]["adapter"] for record in measured] == trained
    assert len(set(trained)) == 2


def test_the_adapter_loads_with_plain_peft(finished):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(finished.folder / "results/for_finetuning/Mistral/best_ppl")
    folder = finished.folder / "results/finetuned/Mistral/best_ppl_finetuned"
    model = PeftModel.from_pretrained(base, folder)
    assert any(p.any() for name, p in model.named_parameters() if "lora_B" in name)
    for name in ("finetuning_config.json", "training_log.txt", "training_state.json", "tokenizer.json"):
        assert (folder / name).exists()


def test_outputs_have_the_read_permissions_of_new_files(study):
    new = study.folder / "new"
    new.touch()
    files = [path for part in ("results", "resources", "logs") for path in (study.folder / part).rglob("*")]
    files = [path for path in files if path.is_file() and not path.is_symlink()]
    assert {path.suffix for path in files} > {".safetensors", ".pt", ".json", ".parquet", ".log"}
    assert not [path for path in files if new.stat().st_mode & ~path.stat().st_mode]


def test_a_checkout_runs_its_own_code_even_if_another_version_is_installed(new_checkout):
    checkout = new_checkout("own code")
    path = checkout.folder / "workflow/scripts/coppice/core/logs.py"
    path.write_text(path.read_text().replace('LINE = "', 'LINE = "here '))
    checkout.run("--cores", "1", "resources/miniature/ptb/dataset.json")
    assert (checkout.folder / "logs/data/build_miniature_world.log").read_text().startswith("here ")


def test_a_second_run_has_nothing_to_do(study):
    """Names every stage as a target; Snakemake rejects a name that it does not know."""
    stages = ("candidates", "select", "finetune", "evaluate", "compare", "report")
    assert "Nothing to be done" in study.run(*stages, *TARGETS, "--cores", "2", config=STUDY).stdout


def test_rebuilds_only_a_deleted_report(study_copy):
    target = REPORT.format("Mistral", "best_acc")
    before = (study_copy.folder / target).read_text()
    (study_copy.folder / target).unlink()
    done = study_copy.run("--cores", "1", target, config=STUDY)
    assert planned_jobs(done) == {"compare_stages": 1} and (study_copy.folder / target).read_text() == before


def test_a_longer_training_reruns_training_and_evaluation_but_no_pruning(study):
    longer = STUDY | {"finetune": STUDY["finetune"].replace("max_steps: 4", "max_steps: 6")}
    jobs = planned_jobs(study.run("-n", config=longer))
    # both configs of Qwen chose the same candidate
    assert jobs["finetune_lora"] == jobs["evaluate_finetuned"] == 3 and jobs["compare_stages"] == 4
    assert not {"prune_candidate", "score_candidate", "evaluate_dense", "evaluate_pruned"} & set(jobs)


def test_keeps_the_status_of_every_job(finished):
    states = [json.loads(path.read_text())["state"] for path in (finished.folder / "results/.status").rglob("*.json")]
    assert states and set(states) == {"done"}


def test_writes_snakemakes_own_report(study):
    study.run("--report", "report.html", config=STUDY)
    assert (study.folder / "report.html").stat().st_size > 100_000


def test_another_workflow_uses_this_one_as_a_module_with_its_own_configuration(study, tmp_path):
    """It has its own results folder and criterion, and uses the miniature world that was already built."""
    settings = yaml.safe_load((study.folder / "config/config.yaml").read_text())
    for key, value in STUDY.items():
        settings[key] = settings.get(key, {}) | yaml.safe_load(value)
    settings["models"]["Qwen"] = {"base": "miniature/qwen", "variant": "base", "family": "qwen", "prompt": "alpaca"}
    settings["results"], settings["resources"] = "theirs", str(study.folder / "resources")
    settings["select"] = {"configs": {"smallest_ppl": {"metric": "ppl.ptb", "mode": "min"}}}
    settings["ablations"] = {}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"study": settings}))
    (tmp_path / "Snakefile").write_text(
        'configfile: "study.yaml"\n'
        "module coppice:\n"
        f'    snakefile: "{study.folder}/workflow/Snakefile"\n'
        '    config: config["study"]\n'
        "use rule * from coppice as coppice_*\n"
        "rule everything:\n"
        "    default_target: True\n"
        '    input: "theirs/finetuned_evaluation/Mistral/smallest_ppl_finetuned/comparison_report.txt"\n'
    )
    jobs = planned_jobs(study.run("-n", cwd=tmp_path))
    assert jobs["coppice_link_training"] == 1 and "coppice_build_miniature_model" not in jobs
    target = "theirs/dense_evaluation/Mistral/evaluation_results.json"
    study.run("--cores", "2", target, cwd=tmp_path)
    assert (tmp_path / target).exists()


def test_the_last_lines_of_a_failed_run_name_the_job_and_the_reason(study_copy):
    """They also name its log and the command that goes on, which works once the cause is gone."""
    adapter = study_copy.folder / "results/finetuned/Mistral/best_ppl_finetuned/adapter_model.safetensors"
    whole = adapter.read_bytes()
    adapter.write_bytes(whole[:-8])
    record = "results/finetuned_evaluation/Mistral/best_ppl_finetuned/evaluation_results.json"
    Path(mirror.origin_of(study_copy.folder / record)).unlink()
    last = study_copy.expect_failure(record, "--cores", "1", config=STUDY).splitlines()[-15:]
    (failed,) = [place for place, line in enumerate(last) if line == "1 job failed:"]
    name = adapter.resolve().parents[1].name
    assert last[failed + 1].startswith(f"  evaluate finetuned Mistral {name}: ") and adapter.name in last[failed + 1]
    assert last[failed + 2] == f"    log: logs/evaluate/finetuned.Mistral.{name}.log"
    assert any(line.startswith(f"  snakemake {record} --cores 1 --config ") for line in last)
    adapter.write_bytes(whole)
    study_copy.run(record, "--cores", "1", config=STUDY)


@pytest.mark.guard
def test_trains_and_evaluates_more_seeds_beside_the_first(study_copy):
    """The first seed's results stay where they are; the reports give the mean and the spread over all seeds."""
    seeds = STUDY | {"finetune": STUDY["finetune"].replace("{max_steps", "{seeds: [42, 7], max_steps")}
    target = REPORT.format("Mistral", "best_acc")
    jobs = planned_jobs(study_copy.run("-n", target, config=seeds))
    assert jobs["finetune_lora"] == 1 and jobs["evaluate_finetuned"] == 1 and "evaluate_pruned" not in jobs
    study_copy.run("--cores", "2", target, config=seeds)
    folder = study_copy.folder / "results/finetuned/Mistral/best_acc_finetuned"
    adapters = [(folder / name / "adapter_model.safetensors").read_bytes() for name in (".", "seed-7")]
    assert adapters[0] != adapters[1]
    record = json.loads((study_copy.folder / target).with_name("comparison.json").read_text())
    assert record["seeds"]["seeds"] == [42, 7]
    assert "mean over seeds" in (study_copy.folder / target).read_text()


@pytest.mark.slow
def test_two_processes_train_together_if_a_job_has_two_gpus(study_copy):
    """Without a GPU they compute on the CPU."""
    together = STUDY | {
        "resources_per_job": "{finetune: {gpu: 2}}",
        "finetune": STUDY["finetune"].replace("max_steps: 4", "max_steps: 5"),
    }
    record = "results/finetuned/Mistral/best_acc_finetuned/finetuning_config.json"
    study_copy.run("--cores", "2", record, config=together)
    found = json.loads((study_copy.folder / record).read_text())
    assert found["processes"] == 2 and found["steps"] == 5
