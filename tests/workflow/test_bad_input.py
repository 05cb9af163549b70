"""What a user gets wrong is said before any job starts: exit code 1, one message that names the key or the file."""

import pytest

CASES = {
    "an unknown key": ({"finetune": "{epoch: 3}"}, ["finetune.epoch", "finetune.epochs"]),
    "a wrong type": ({"finetune": "{epochs: many}"}, ["finetune.epochs"]),
    "a model folder that does not exist": ({"models": "{Mine: {base: ./nowhere}}"}, ["models.Mine.base", "nowhere"]),
    "an unknown task": ({"evaluate": "{zero_shot: {tasks: [pika]}}"}, ["evaluate.zero_shot.tasks", "pika", "piqa"]),
    "an unknown dataset": ({"evaluate": "{perplexity: {datasets: [wikitext]}}"}, ["wikitext", "wikitext2"]),
    "a name with a slash": ({"models": "{a/b: {base: miniature/llama}}"}, ["a/b"]),
    "a name with two dots": ({"models": "{a..b: {base: miniature/llama}}"}, ["a..b"]),
    "an unknown model in only": ({"only": "{models: [Lama]}"}, ["only.models", "Llama"]),
}


@pytest.fixture(scope="module")
def checkout(new_checkout):
    return new_checkout("bad")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_key_is_named(checkout, case):
    config, words = CASES[case]
    done = checkout.snakemake("-n", config=config)
    assert done.returncode == 1
    message = done.stdout
    assert all(word in message for word in words), message
    assert "Traceback" not in message and not (checkout.folder / "results").exists()


def test_an_unknown_model_in_a_target_path_is_named_with_the_nearest_one(checkout):
    done = checkout.snakemake("results/finetuned_evaluation/Lama/best_acc_finetuned/comparison_report.txt", "-n")
    assert done.returncode == 1 and "'Lama'" in done.stdout and "did you mean 'Llama'" in done.stdout


def test_a_study_without_models_is_refused(checkout):
    names = ("Llama", "Llama-Instruct", "Qwen", "Qwen-Instruct", "Mistral", "Mistral-Instruct")
    overlay = checkout.folder / "none.yaml"
    overlay.write_text("models:\n" + "".join(f"  {name}: null\n" for name in names))
    done = checkout.snakemake("-n", "--configfile", str(overlay))
    assert done.returncode == 1 and "no model" in done.stdout


def test_the_same_model_twice_in_a_file_is_refused_with_both_lines(checkout):
    overlay = checkout.folder / "twice.yaml"
    overlay.write_text("models:\n  Llama: {base: miniature/llama}\n  Llama: {base: miniature/qwen}\n")
    done = checkout.snakemake("-n", "--configfile", str(overlay))
    assert done.returncode == 1 and "twice.yaml" in done.stdout and "Llama" in done.stdout


def test_values_on_the_command_line_are_accepted(checkout):
    done = checkout.snakemake("-n", "-q", config={"finetune": "{epochs: 3}", "seed": "7"})
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("overlay", ["config/full.yaml"])
def test_the_real_study_plans_without_a_network(checkout, overlay):
    done = checkout.snakemake("-n", "-q", "--configfile", overlay)
    assert done.returncode == 0, done.stdout
