"""Candidates in the workflow: every kind of user checkpoint, configs that choose the same one, and released weights."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import import_pickle
import pytest
import torch
from torch import nn

from tests.study.checkout import SMALL, WITHOUT_COST, copy_study, planned_jobs

pytestmark = pytest.mark.guard
CONFIGS = "{configs: {best_acc: {metric: average_acc, mode: max}, best_ppl: null}}"


class Pruned(nn.Module):
    """A model as LLM-Pruner pickles it: the tool's own class, with the parts under the usual names."""

    def __init__(self, model):
        super().__init__()
        self.model, self.lm_head, self.config = model.model, model.lm_head, model.config


def read(checkout, path):
    return json.loads((checkout.folder / path).read_text())


@pytest.fixture(scope="module")
def world(study):
    """Return the settings of a study that uses the data and dense models of the small study, and measures no speed."""
    return SMALL | {"resources": study.folder / "resources", "evaluate": WITHOUT_COST}


@pytest.fixture(scope="module")
def dense(study):
    return study.folder / "resources/miniature/models/mistral/checkpoint"


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def narrow(model):
    """Cut the MLP of each layer of a model to a different width."""
    for place, layer in enumerate(model.model.layers):
        kept = layer.mlp.gate_proj.out_features - 8 * (place + 1)
        for name in ("gate_proj", "up_proj"):
            linear = getattr(layer.mlp, name)
            linear.weight, linear.out_features = nn.Parameter(linear.weight[:kept].clone()), kept
        layer.mlp.down_proj.weight = nn.Parameter(layer.mlp.down_proj.weight[:, :kept].clone())
        layer.mlp.down_proj.in_features = kept
    return model


def sharded(dense, folder, tokenizer):
    model = load(dense)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(folder, max_shard_size="1MB")
    assert len(list(folder.glob("*.safetensors"))) > 1


def plain_bin(dense, folder, tokenizer):
    model = load(dense)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def sparse(dense, folder, tokenizer):
    """Make a 2:4 checkpoint: of every four weights in a row, the two largest stay."""
    model = load(dense)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (m for m in layer.modules() if isinstance(m, nn.Linear)):
                groups = linear.weight.view(-1, 4)
                groups[torch.zeros_like(groups, dtype=bool).scatter_(1, groups.abs().topk(2, 1, False)[1], True)] = 0
    model.save_pretrained(folder)


def odd_shaped(dense, folder, tokenizer):
    model = narrow(load(dense))
    model.save_pretrained(folder)


def pickled(dense, folder, tokenizer):
    path = folder.with_suffix(".pkl")
    torch.save({"model": Pruned(narrow(load(dense))), "tokenizer": tokenizer}, path)
    import_pickle.convert(path, folder, trusted=True)


KINDS = {kind.__name__: kind for kind in (sharded, plain_bin, sparse, odd_shaped, pickled)}


def write_table(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def users_study(world, dense, new_checkout):
    """Run a study of a user's own checkpoints, one of each kind that is accepted, to its end."""
    from transformers import AutoTokenizer

    checkout = new_checkout("own candidates")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    rows = []
    for place, (name, make) in enumerate(KINDS.items()):
        folder = checkout.folder / "search results" / name
        folder.mkdir(parents=True)
        make(dense, folder, tokenizer)
        tokenizer.save_pretrained(folder)
        rows.append({"model": "Mistral", "candidate": name, "path": folder, "trial": place})
    write_table(checkout.folder / "mine.tsv", rows)
    checkout.config = world | {
        "candidates": "{table: mine.tsv}",
        "select": "{configs: {best_ppl: null, last: {metric: trial, mode: max}}}",
    }
    checkout.run("--cores", "2", config=checkout.config)
    return checkout


def test_finishes_a_study_of_every_kind_of_checkpoint(users_study):
    table = (users_study.folder / "results/candidates.tsv").read_text()
    assert all(name in table for name in KINDS)
    scored = [
        read(users_study, f"results/candidate_evaluation/Mistral/{name}/evaluation_results.json") for name in KINDS
    ]
    assert len({record["perplexity"]["wikitext2"]["value"] for record in scored}) >= 4
    assert "Nothing to be done" in users_study.run("-n", config=users_study.config).stdout


def test_selects_finetunes_and_evaluates_an_imported_pickle(users_study):
    info = read(users_study, "results/for_finetuning/Mistral/last/selection_info.json")
    assert info["candidate"] == "pickled" and info["metrics_from"] == "the user's table"
    record = read(users_study, "results/finetuned_evaluation/Mistral/last_finetuned/evaluation_results.json")
    assert (
        record["parameters"]
        < read(users_study, "results/dense_evaluation/Mistral/evaluation_results.json")["parameters"]
    )
    report = users_study.folder / "results/finetuned_evaluation/Mistral/last_finetuned/comparison_report.txt"
    assert "pickled (method imported)" in report.read_text()


def test_does_not_change_the_users_checkpoints(users_study):
    for name in KINDS:
        folder = users_study.folder / "search results" / name
        assert not list(folder.glob("pruning.json")) and not list(folder.glob(".*"))
        assert all(not file.is_symlink() for file in folder.iterdir())


def test_select_runs_no_gpu_job_if_the_table_has_the_metrics(users_study):
    folder = users_study.folder / "search results"
    rows = [
        {"model": "Mistral", "candidate": name, "path": folder / name, "acc": 0.4 + place / 10, "ppl": 20 + place}
        for place, name in enumerate(KINDS)
    ]
    write_table(users_study.folder / "known.csv", rows)
    config = users_study.config | {
        "results": "known",
        "candidates": "{table: known.csv}",
        "select": "{configs: {best_ppl: {metric: ppl.wikitext2, mode: min}}}",
    }
    jobs = planned_jobs(users_study.run("select", "-n", config=config))
    choosing = {"gather_candidates", "select_best", "summarize_selection", "select"}
    assert set(jobs) == {"import_candidate", *choosing}
    users_study.run("select", "--cores", "2", config=config)
    chosen = {
        name: read(users_study, f"known/for_finetuning/Mistral/{name}/selection_info.json")["candidate"]
        for name in ("best_acc", "best_ppl")
    }
    assert chosen == {"best_acc": "pickled", "best_ppl": "sharded"}
    page = (users_study.folder / "known/for_finetuning/SUMMARY.md").read_text()
    assert (
        "`pickled`" in page and (users_study.folder / "known/for_finetuning/figures/Mistral.png").stat().st_size > 5000
    )


def test_imports_a_checkpoint_again_if_only_its_weights_changed(users_study):
    """Its config.json does not change: the table names the whole folder."""
    weights = users_study.folder / "search results/sparse/model.safetensors"
    before = weights.stat()
    os.utime(weights)
    jobs = planned_jobs(users_study.run("-n", config=users_study.config))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert jobs["import_candidate"] == jobs["score_candidate"] == 1


@pytest.fixture(scope="module")
def one_choice(world, new_checkout):
    """Run a study in which two configs choose the same candidate and all weights are kept."""
    checkout = new_checkout("searched")
    checkout.config = world | {
        "select": CONFIGS.replace("best_ppl: null", "best_ppl: null, again: {metric: average_acc, mode: max}"),
        "candidates": SMALL["candidates"].replace("{prune", "{keep: all, prune"),
        "finetune": SMALL["finetune"].replace("{max_steps", "{merge: true, max_steps"),
    }
    checkout.run("--cores", "2", "--resources", "gpu=1", config=checkout.config)
    return checkout


def test_trains_and_evaluates_a_candidate_of_two_configs_once(one_choice):
    results = one_choice.folder / "results"
    selections = [read(one_choice, path) for path in results.glob("for_finetuning/Mistral/*/selection_info.json")]
    chosen = next(info["candidate"] for info in selections if info["config"] == "best_acc")
    trained = [path.parts[-3] for path in results.glob("by_candidate/Mistral/*/finetuned/finetuning_config.json")]
    assert len(selections) == 2 and trained == [chosen]
    places = {
        "finetuned": "finetuned/Mistral/{}_finetuned",
        "pruned_evaluation": "pruned_evaluation/Mistral/{}",
        "finetuned_evaluation": "finetuned_evaluation/Mistral/{}_finetuned",
    }
    for kind, pattern in places.items():
        made = {path.name for path in (results / "by_candidate/Mistral" / chosen / kind).glob("[!.]*")}
        for config in ("best_acc", "again"):
            folder = results / pattern.format(config)
            assert made <= {path.name for path in folder.iterdir() if path.exists()}
            name = "finetuning_config.json" if kind == "finetuned" else "evaluation_results.json"
            record = read(one_choice, folder / name)
            assert (record["config"], record["candidate"]) == (config, chosen)
            assert record.get("reused_from") == ("best_acc" if config == "again" else None)
    report = one_choice.folder / "results/finetuned_evaluation/Mistral/again_finetuned/comparison_report.txt"
    assert "the same candidate as best_acc" in report.read_text()
    assert "the same candidate as best_acc" in (one_choice.folder / "results/for_finetuning/SUMMARY.md").read_text()


def test_a_run_of_the_second_config_alone_keeps_its_reused_result(one_choice):
    second_alone = one_choice.config | {"only": "{models: [Mistral], configs: [again]}"}
    assert "finetune_lora" not in planned_jobs(one_choice.run("-n", config=second_alone))


def test_another_choice_trains_no_candidate_again_and_relinks_only_its_own_results(one_choice):
    first, again = (one_choice.folder / f"results/finetuned/Mistral/{name}_finetuned" for name in ("best_acc", "again"))
    before = (first / "merged/model.safetensors").read_bytes()
    otherwise = one_choice.config | {"select": one_choice.config["select"].replace("max}}", "min}}")}
    one_choice.run("--cores", "2", config=otherwise)
    assert "reused_from" not in read(one_choice, "results/finetuned/Mistral/again_finetuned/finetuning_config.json")
    assert (first / "merged/model.safetensors").read_bytes() == before
    assert (again / "merged/model.safetensors").read_bytes() != before
    back = planned_jobs(one_choice.run("--cores", "2", config=one_choice.config))
    assert back["link_training"] == 1 and not {"finetune_lora", "evaluate_pruned", "evaluate_finetuned"} & set(back)
    assert (again / "merged/model.safetensors").read_bytes() == before
    assert read(one_choice, "results/finetuned/Mistral/again_finetuned/training_state.json")["config"] == "again"
    assert "Nothing to be done" in one_choice.run("-n", config=one_choice.config).stdout


def test_the_links_of_configs_hold_in_a_copy_of_the_study(one_choice, tmp_path):
    """Snakemake finds nothing to do in the copy, and finds nothing to do after it touched every file."""
    copied = copy_study(one_choice, tmp_path / "copy")
    links = [path for path in (copied.folder / "results/finetuned").rglob("*") if path.is_symlink()]
    assert links and all(path.resolve().is_relative_to(copied.folder) and path.exists() for path in links)
    assert "Nothing to be done" in copied.run("-n", config=one_choice.config).stdout
    copied.run("--touch", "--cores", "1", config=one_choice.config)
    assert "Nothing to be done" in copied.run("-n", config=one_choice.config).stdout


def weights(checkout, candidate):
    return checkout.folder / "results/candidates/Mistral" / candidate / "model.safetensors"


def test_releases_the_weights_of_other_candidates_and_makes_them_again_when_needed(one_choice):
    names = [path.name for path in (one_choice.folder / "results/candidates/Mistral").iterdir() if path.is_dir()]
    chosen = read(one_choice, "results/for_finetuning/Mistral/best_acc/selection_info.json")["candidate"]
    (loser,) = [name for name in names if name != chosen]
    assert weights(one_choice, loser).stat().st_size > 2**20  # Snakemake computes checksums of smaller files only
    assert "Nothing to be done" in one_choice.run("-n", config=one_choice.config).stdout

    selected = one_choice.config | {"candidates": SMALL["candidates"]}
    assert planned_jobs(one_choice.run("-n", config=selected)) == {"release_weights": 1, "all": 1}
    one_choice.run("--cores", "1", config=selected)
    assert not weights(one_choice, loser).exists() and weights(one_choice, chosen).exists()
    assert read(one_choice, "results/candidates/Mistral/released.json")["freed_bytes"][loser] > 2**20
    assert "Nothing to be done" in one_choice.run("-n", config=selected).stdout

    later = selected | {"select": selected["select"].replace("again", "worst").replace("max}}", "min}}")}
    shutil.rmtree(one_choice.folder / "results/by_candidate/Mistral" / loser)
    target = "results/pruned_evaluation/Mistral/worst/evaluation_results.json"
    jobs = planned_jobs(one_choice.run("-n", target, config=later))
    assert jobs == {"select_best": 1, "link_pruned": 1}  # Snakemake learns the candidate from the selection
    one_choice.run("--cores", "1", target, config=later)
    assert read(one_choice, target)["config"] == "worst"
    record = read(one_choice, f"results/candidates/Mistral/{loser}/pruning.json")
    assert read(one_choice, target)["provenance"]["fingerprints"]["weights"] == record["weights_fingerprint"]
    log = one_choice.folder / f"logs/evaluate/pruned.Mistral.{loser}.log"
    assert "pruning the candidate again" in log.read_text()


def test_pruned_checkpoints_load_without_this_project(one_choice, tmp_path):
    """Plain transformers loads them with nothing of this project on the path."""
    chosen = read(one_choice, "results/for_finetuning/Mistral/best_acc/selection_info.json")["candidate"]
    program = (
        "import sys, importlib.util\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "sys.path[:] = [p for p in sys.path if 'workflow' not in p]\n"
        "model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info\n"
        "ids = AutoTokenizer.from_pretrained(sys.argv[1])('The', return_tensors='pt').input_ids\n"
        "print(model(ids).logits.shape, 'coppice' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, str(weights(one_choice, chosen).parent)],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=True,
    )
    assert done.stdout.endswith("False\n")


def test_rejects_a_grid_point_that_does_not_fit_a_local_model_before_pruning(world, dense, new_checkout):
    checkout = new_checkout("misfit")
    config = world | {
        "only": "{models: [Mine]}",
        "models": f"{{Mine: {{base: {dense}, variant: base}}}}",
        "candidates": "{per_job: one, prune: [{method: depth, ratio: 0.34}, {method: depth, ratio: 0.99}]}",
    }
    done = checkout.snakemake("select", "--cores", "2", config=config)
    assert done.returncode == 1
    assert "Mine: candidate depth-0.99" in done.stdout and "would leave none" in done.stdout
    assert "Traceback" not in done.stdout
    assert not list(Path(checkout.folder / "results").rglob("pruning.json"))
    assert not (checkout.folder / "resources/models/Mine/config.json").exists()  # so the next run checks again
