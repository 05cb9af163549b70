"""What a user gets wrong is said before any job starts: exit code 1, one message that names the key or the file."""

import resource

import pytest

from coppice.core import records

# What the keys may hold is tested in tests/faults; here, that Snakemake prints what is said of them
CASES = {
    "an unknown key": ({"finetune": "{epoch: 3}"}, ["finetune.epoch", "finetune.epochs"]),
    "a model folder that does not exist": ({"models": "{Mine: {base: ./nowhere}}"}, ["models.Mine.base", "nowhere"]),
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
    "aliases that multiply": (ALIASES, ["study.yaml", "an alias expands to more than"]),
    "a name with escape codes": (b'models: {"a\\e[31m": {base: miniature/llama}}\n', ["models", "U+001B"]),
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
    message = checkout.refused("-n", config=config)
    assert all(word in message for word in words), message
    assert not (checkout.folder / "results").exists()


def test_an_unknown_model_in_a_target_path_is_named_with_the_nearest_one(checkout):
    said = checkout.refused("results/finetuned_evaluation/Lama/best_acc_finetuned/comparison_report.txt", "-n")
    assert "'Lama'" in said and "did you mean 'Llama'" in said


def test_a_study_without_models_is_refused(checkout):
    names = ("Llama", "Llama-Instruct", "Qwen", "Qwen-Instruct", "Mistral", "Mistral-Instruct")
    overlay = checkout.folder / "none.yaml"
    overlay.write_text("models:\n" + "".join(f"  {name}: null\n" for name in names))
    assert "no model" in checkout.refused("-n", "--configfile", str(overlay))


def test_the_same_model_twice_in_a_file_is_refused_with_both_lines(checkout):
    overlay = checkout.folder / "twice.yaml"
    overlay.write_text("models:\n  Llama: {base: miniature/llama}\n  Llama: {base: miniature/qwen}\n")
    said = checkout.refused("-n", "--configfile", str(overlay))
    assert "twice.yaml" in said and "Llama" in said


@pytest.mark.parametrize("case", FILES, ids=str)
def test_a_configuration_file_that_is_none_is_told_at_once(checkout, case):
    content, words = FILES[case]
    (checkout.folder / "study.yaml").write_bytes(content)
    before = processor_seconds()
    said = checkout.refused("-n", "--configfile", "study.yaml")
    assert processor_seconds() - before < 10  # not by the clock: other tests run beside this one
    assert all(word in said for word in words), said
    assert not list(checkout.folder.parent.rglob("pwned*")) and "\x1b[31m" not in said


def test_a_torn_checkpoint_is_told_by_the_job_that_registers_it(checkout):
    folder = checkout.folder / "my model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    mine = {"models": "{Mine: {base: './my model'}}", "only": "{models: [Mine]}"}
    said = checkout.refused("resources/models/Mine/model.json", "--cores", "1", config=mine)
    assert "my model/model.safetensors: cannot be read as safetensors" in said
    assert not [path for path in (checkout.folder / "logs").rglob("*.log") if "Traceback" in path.read_text()]


def test_a_model_of_another_study_in_shared_resources_is_never_taken_for_ones_own(checkout):
    """Snakemake knows what it made in this folder, and of a file that another study made only that it is there."""
    shared = checkout.folder / "shared"
    for name in ("theirs", "ours"):
        (checkout.folder / name).mkdir()
        (checkout.folder / name / "config.json").write_text('{"model_type": "llama"}')
    source = {"kind": "local", "path": str(checkout.folder / "theirs")}
    records.write(shared / "models/Mine/model.json", {"source": source, "revision": None, "path": source["path"]})
    mine = {"models": "{Mine: {base: ./ours}}", "only": "{models: [Mine]}", "resources": "shared"}
    said = checkout.refused("results/dense_evaluation/Mine/evaluation_results.json", "--cores", "1", config=mine)
    assert "Finished jobid" not in said
    for words in ("shared/models/Mine/model.json: was made with base", "set resources to a folder of"):
        assert words in said


def test_a_results_folder_of_any_name_is_planned_and_nothing_of_it_is_run(checkout):
    done = checkout.run("-n", config={"results": ODD.replace("pwned", "pwned2")})
    assert "finetune_lora" in done.stdout
    assert not list(checkout.folder.parent.rglob("pwned*"))


def test_values_on_the_command_line_are_accepted(checkout):
    checkout.run("-n", "-q", config={"finetune": "{epochs: 3}", "seed": "7"})


def test_the_real_study_plans_without_a_network(checkout):
    checkout.run("-n", "-q", "--configfile", "config/full.yaml")
