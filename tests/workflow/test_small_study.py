"""A small study, run for real: what it writes, what it does the second time, and how others use it."""

import json

import yaml

from .conftest import SMALL

REPORT = "results/finetuned_evaluation/Mistral/{}_finetuned/comparison_report.txt"
EVALUATION = {"model", "config", "stage", "perplexity", "zero_shot", "average_acc", "parameters", "provenance"}


def jobs(done):
    """Rule names in the job stats of a dry run, with their counts."""
    lines = done.stdout.partition("Job stats:")[2].partition("total")[0].splitlines()
    return {words[0]: int(words[1]) for line in lines if len(words := line.split()) == 2 and words[1].isdigit()}


def test_it_writes_a_report_a_config(small_study):
    for config in ("best_acc", "best_ppl"):
        text = (small_study.folder / REPORT.format(config)).read_text()
        assert "wikitext2" in text and "piqa" in text and "mean" in text
        assert max(map(len, text.splitlines())) <= 100


def test_every_evaluation_has_the_fields_of_schema_1(small_study):
    results = small_study.folder / "results"
    found = sorted(results.glob("*_evaluation/**/evaluation_results.json"))
    stages = [json.loads(path.read_text())["stage"] for path in found if "candidate_evaluation" not in str(path)]
    assert sorted(stages) == ["dense", "finetuned", "finetuned", "pruned", "pruned"]
    for path in found:
        record = json.loads(path.read_text())
        assert record["schema_version"] == 1
        missing = EVALUATION - set(record) - ({"config"} if record["stage"] == "candidate" else set())
        assert not missing, path
        assert {"metric", "value", "stderr", "n", "version", "acc", "acc_norm", "engine"} <= set(
            record["zero_shot"]["piqa"]
        )
        assert (path.parent / "samples/piqa.parquet").exists() and (path.parent / "ppl_results.json").exists()


def test_the_chosen_checkpoint_is_linked_and_loads_in_plain_transformers(small_study):
    from transformers import AutoModelForCausalLM

    folder = small_study.folder / "results/for_finetuning/Mistral/best_acc"
    assert (folder / "model.safetensors").is_symlink()
    info = json.loads((folder / "selection_info.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == info["parameters"]
    assert info["candidate"] in info["candidates_considered"] and info["runner_up"]["margin"] >= 0


def test_the_adapter_loads_with_plain_peft(small_study):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(small_study.folder / "results/for_finetuning/Mistral/best_ppl")
    folder = small_study.folder / "results/finetuned/Mistral/best_ppl_finetuned"
    model = PeftModel.from_pretrained(base, folder)
    assert any(p.any() for name, p in model.named_parameters() if "lora_B" in name)
    for name in ("finetuning_config.json", "training_log.txt", "training_state.json", "tokenizer.json"):
        assert (folder / name).exists()


def test_whoever_may_read_new_files_may_read_all_that_a_study_wrote(small_study):
    new = small_study.folder / "new"
    new.touch()
    files = [path for part in ("results", "resources", "logs") for path in (small_study.folder / part).rglob("*")]
    files = [path for path in files if path.is_file() and not path.is_symlink()]
    assert {path.suffix for path in files} > {".safetensors", ".pt", ".json", ".parquet", ".log"}
    assert not [path for path in files if new.stat().st_mode & ~path.stat().st_mode]


def test_a_checkout_runs_its_own_code_whatever_is_installed(new_checkout):
    checkout = new_checkout("own code")
    path = checkout.folder / "workflow/scripts/coppice/logs.py"
    path.write_text(path.read_text().replace('LINE = "', 'LINE = "here '))
    checkout.run("--cores", "1", "resources/miniature/ptb/dataset.json")
    assert (checkout.folder / "logs/data/build_miniature_world.log").read_text().startswith("here ")


def test_a_second_run_has_nothing_to_do(small_study):
    done = small_study.run("--cores", "2", config=SMALL)
    assert "Nothing to be done" in done.stdout


def test_a_deleted_report_is_rebuilt_alone(small_study):
    path = small_study.folder / REPORT.format("best_acc")
    before = path.read_text()
    path.unlink()
    assert jobs(small_study.run("-n", REPORT.format("best_acc"), config=SMALL)) == {"compare_stages": 1}
    small_study.run("--cores", "1", REPORT.format("best_acc"), config=SMALL)
    assert path.read_text() == before
    small_study.run("--cores", "1", config=SMALL)  # the study's report is rendered from the new comparison


def test_a_longer_training_reruns_training_and_what_follows_but_no_pruning(small_study):
    longer = SMALL | {"finetune": SMALL["finetune"].replace("max_steps: 4", "max_steps: 6")}
    planned = jobs(small_study.run("-n", config=longer))
    assert planned["finetune_lora"] == 2 and planned["evaluate_finetuned"] == 2
    assert not {"prune_candidate", "score_candidate", "evaluate_dense", "evaluate_pruned"} & set(planned)


def test_the_status_of_every_job_is_kept(small_study):
    states = [
        json.loads(path.read_text())["state"] for path in (small_study.folder / "results/.status").rglob("*.json")
    ]
    assert states and set(states) == {"done"}


def test_snakemakes_own_report_is_written(small_study):
    small_study.run("--report", "report.html", config=SMALL)
    assert (small_study.folder / "report.html").stat().st_size > 100_000


def test_another_workflow_uses_this_one_as_a_module_with_its_own_configuration(small_study, tmp_path):
    """Its own results folder and models; the miniature world is taken from where it was built."""
    settings = yaml.safe_load((small_study.folder / "config/config.yaml").read_text())
    for key, value in SMALL.items():
        settings[key] = settings.get(key, {}) | yaml.safe_load(value)
    settings["results"], settings["resources"] = "theirs", str(small_study.folder / "resources")
    settings["select"] = {"configs": {"smallest_ppl": {"metric": "ppl.ptb", "mode": "min"}}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"study": settings}))
    (tmp_path / "Snakefile").write_text(
        'configfile: "study.yaml"\n'
        "module coppice:\n"
        f'    snakefile: "{small_study.folder}/workflow/Snakefile"\n'
        '    config: config["study"]\n'
        "use rule * from coppice as coppice_*\n"
        "rule everything:\n"
        "    default_target: True\n"
        '    input: "theirs/finetuned_evaluation/Mistral/smallest_ppl_finetuned/comparison_report.txt"\n'
    )
    small_study.run("--cores", "2", cwd=tmp_path)
    assert (tmp_path / "theirs/finetuned_evaluation/Mistral/smallest_ppl_finetuned/comparison_report.txt").exists()


def test_each_stage_is_a_target_by_name(small_study):
    """All at once: Snakemake refuses a name that it does not know, and has nothing to do only if no stage has."""
    stages = ("candidates", "select", "finetune", "evaluate", "compare", "report")
    assert "Nothing to be done" in small_study.run(*stages, "-n", config=SMALL).stdout


def test_further_seeds_are_trained_and_evaluated_beside_the_first(small_study):
    """The first seed's results stand where they are; the reports give mean and spread over all."""
    seeds = SMALL | {"finetune": SMALL["finetune"].replace("{max_steps", "{seeds: [42, 7], max_steps")}
    target = REPORT.format("best_acc")
    planned = jobs(small_study.run("-n", target, config=seeds))
    assert planned["finetune_lora"] == 1 and planned["evaluate_finetuned"] == 1 and "evaluate_pruned" not in planned
    small_study.run("--cores", "2", target, config=seeds)
    folder = small_study.folder / "results/finetuned/Mistral/best_acc_finetuned"
    adapters = [(folder / name / "adapter_model.safetensors").read_bytes() for name in (".", "seed-7")]
    assert adapters[0] != adapters[1]
    record = json.loads((small_study.folder / target).with_name("comparison.json").read_text())
    assert record["seeds"]["seeds"] == [42, 7]
    assert "Over seeds" in (small_study.folder / target).read_text()
    small_study.run("--cores", "2", config=SMALL)  # as it was


def test_two_processes_train_together_where_a_job_has_two_gpus(small_study):
    """Without a GPU they compute on the CPU. Last, because it leaves the study with another adapter."""
    together = SMALL | {
        "resources_per_job": "{finetune: {gpu: 2}}",
        "finetune": SMALL["finetune"].replace("max_steps: 4", "max_steps: 5"),
    }
    record = "results/finetuned/Mistral/best_acc_finetuned/finetuning_config.json"
    small_study.run("--cores", "2", record, config=together)
    found = json.loads((small_study.folder / record).read_text())
    assert found["processes"] == 2 and found["steps"] == 5
