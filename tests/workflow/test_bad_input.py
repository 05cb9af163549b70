"""What a user gets wrong is said before any job starts: exit code 1, one message that names the key or the file."""

import resource

import pytest

from coppice import records

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


ALIASES = b"a: &a [1,1,1,1,1,1,1,1,1,1]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 10)) for i in range(8)
)
ODD = """mein Ordner "ü" 'x' $(touch pwned) & ; #"""

# The readers themselves are tested in tests/faults. Of a file that YAML cannot read, the words are Snakemake's, which
# reads it before anything of this workflow runs.
FILES = {
    "torn": (b"models: {Llama: {base: mini", ["Config file is not valid JSON or YAML"]),
    "a list": (b"- a\n", ["Config file must be given as JSON or YAML with keys"]),
    "Python to run": (b"seed: !!python/object/apply:os.system ['touch pwned']\n", ["Config file is not valid"]),
    "aliases that multiply": (ALIASES, ["study.yaml", "an alias stands for more than"]),
    "a name with escape codes": (b'models: {"a\\e[31m": {base: miniature/llama}}\n', ["models", "U+001B"]),
    "a huge seed": (b"seed: 99999999999999999999\n", ["seed", "1e+15"]),
    "a table that is none": (b"candidates: {table: study.yaml}\n", ["study.yaml", "model"]),
}


def processor_seconds():
    """Of the processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def checkout(new_checkout):
    return new_checkout(ODD)


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


@pytest.mark.parametrize("case", FILES, ids=str)
def test_a_configuration_file_that_is_none_is_told_at_once(checkout, case):
    content, words = FILES[case]
    (checkout.folder / "study.yaml").write_bytes(content)
    before = processor_seconds()
    done = checkout.snakemake("-n", "--configfile", "study.yaml")
    assert processor_seconds() - before < 10  # not by the clock: other tests run beside this one
    assert done.returncode == 1, done.stdout
    assert all(word in done.stdout for word in words) and "Traceback" not in done.stdout, done.stdout
    assert not list(checkout.folder.parent.rglob("pwned*")) and "\x1b[31m" not in done.stdout


def test_a_torn_checkpoint_is_told_by_the_job_that_registers_it(checkout):
    folder = checkout.folder / "my model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    mine = {"models": "{Mine: {base: './my model'}}", "only": "{models: [Mine]}"}
    done = checkout.snakemake("resources/models/Mine/model.json", "--cores", "1", config=mine)
    assert done.returncode == 1 and "my model/model.safetensors: cannot be read as safetensors" in done.stdout
    assert "Traceback" not in done.stdout and "Traceback" not in "".join(
        path.read_text() for path in (checkout.folder / "logs").rglob("*.log")
    )


def test_a_model_of_another_study_in_shared_resources_is_never_taken_for_ones_own(checkout):
    """Snakemake knows what it made in this folder, and of a file that another study made only that it is there."""
    shared = checkout.folder / "shared"
    for name in ("theirs", "ours"):
        (checkout.folder / name).mkdir()
        (checkout.folder / name / "config.json").write_text('{"model_type": "llama"}')
    source = {"kind": "local", "path": str(checkout.folder / "theirs")}
    records.write(shared / "models/Mine/model.json", {"source": source, "revision": None, "path": source["path"]})
    mine = {"models": "{Mine: {base: ./ours}}", "only": "{models: [Mine]}", "resources": "shared"}
    done = checkout.snakemake("results/dense_evaluation/Mine/evaluation_results.json", "--cores", "1", config=mine)
    assert done.returncode == 1 and "Finished jobid" not in done.stdout
    for words in ("shared/models/Mine/model.json: was made with base", "set resources to a folder of"):
        assert words in done.stdout
    assert "Traceback" not in done.stdout


def test_a_results_folder_of_any_name_is_planned_and_nothing_of_it_is_run(checkout):
    done = checkout.run("-n", config={"results": ODD.replace("pwned", "pwned2")})
    assert "finetune_lora" in done.stdout
    assert not list(checkout.folder.parent.rglob("pwned*"))


def test_values_on_the_command_line_are_accepted(checkout):
    done = checkout.snakemake("-n", "-q", config={"finetune": "{epochs: 3}", "seed": "7"})
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("overlay", ["config/full.yaml"])
def test_the_real_study_plans_without_a_network(checkout, overlay):
    done = checkout.snakemake("-n", "-q", "--configfile", overlay)
    assert done.returncode == 0, done.stdout
