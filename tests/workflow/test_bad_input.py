"""A user's mistake is reported before any job starts: exit status 1 and one message that names the key or the file."""

import resource

import pytest

from coppice.core import records

# tests/faults tests which values each key accepts; these cases test that Snakemake prints the message.
CASES = {
    "an unknown key": ({"finetune": "{epoch: 3}"}, ["finetune.epoch", "finetune.epochs"]),
    "a model folder that does not exist": ({"models": "{Mine: {base: ./nowhere}}"}, ["models.Mine.base", "nowhere"]),
    "an unknown model in only": ({"only": "{models: [Lama]}"}, ["only.models", "Llama"]),
}


ALIASES = b"a: &a [1,1,1,1,1,1,1,1,1,1]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 10)) for i in range(8)
)
ODD = """mein Ordner "ü" 'x' $(touch pwned) & ; #"""

# tests/faults tests the readers. If YAML cannot read a file, the message is Snakemake's, which reads the file before
# any code of this workflow runs.
FILES = {
    "truncated": (b"models: {Llama: {base: mini", ["Config file is not valid JSON or YAML"]),
    "a list": (b"- a\n", ["Config file must be given as JSON or YAML with keys"]),
    "a Python object": (b"seed: !!python/object/apply:os.system ['touch pwned']\n", ["Config file is not valid"]),
    "nested aliases": (ALIASES, ["study.yaml", "an alias expands to more than"]),
    "a name with escape codes": (b'models: {"a\\e[31m": {base: miniature/llama}}\n', ["models", "U+001B"]),
}


def cpu_seconds_of_children():
    """Return the CPU seconds of all ended child processes of this process."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def checkout(new_checkout):
    return new_checkout(ODD)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_names_the_wrong_key(checkout, case):
    config, words = CASES[case]
    message = checkout.expect_failure("-n", config=config)
    assert all(word in message for word in words), message
    assert not (checkout.folder / "results").exists()


def test_names_an_unknown_model_in_a_target_path_and_suggests_the_nearest(checkout):
    output = checkout.expect_failure("results/finetuned_evaluation/Lama/best_acc_finetuned/comparison_report.txt", "-n")
    assert "'Lama'" in output and "did you mean 'Llama'" in output


def test_rejects_a_study_without_models(checkout):
    names = ("Llama", "Llama-Instruct", "Qwen", "Qwen-Instruct", "Mistral", "Mistral-Instruct")
    overlay = checkout.folder / "none.yaml"
    overlay.write_text("models:\n" + "".join(f"  {name}: null\n" for name in names))
    assert "no model" in checkout.expect_failure("-n", "--configfile", str(overlay))


def test_rejects_a_model_given_twice_in_a_file(checkout):
    overlay = checkout.folder / "twice.yaml"
    overlay.write_text("models:\n  Llama: {base: miniature/llama}\n  Llama: {base: miniature/qwen}\n")
    output = checkout.expect_failure("-n", "--configfile", str(overlay))
    assert "twice.yaml" in output and "Llama" in output


@pytest.mark.parametrize("case", FILES, ids=str)
def test_rejects_an_invalid_configuration_file_quickly(checkout, case):
    content, words = FILES[case]
    (checkout.folder / "study.yaml").write_bytes(content)
    before = cpu_seconds_of_children()
    output = checkout.expect_failure("-n", "--configfile", "study.yaml")
    assert cpu_seconds_of_children() - before < 10  # CPU time, because other tests run at the same time
    assert all(word in output for word in words), output
    assert not list(checkout.folder.parent.rglob("pwned*")) and "\x1b[31m" not in output


def test_the_job_that_registers_a_model_rejects_a_truncated_checkpoint(checkout):
    folder = checkout.folder / "my model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    mine = {"models": "{Mine: {base: './my model'}}", "only": "{models: [Mine]}"}
    output = checkout.expect_failure("resources/models/Mine/model.json", "--cores", "1", config=mine)
    assert "my model/model.safetensors: cannot be read as safetensors" in output
    assert not [path for path in (checkout.folder / "logs").rglob("*.log") if "Traceback" in path.read_text()]


def test_rejects_a_model_of_another_study_in_shared_resources(checkout):
    """Of a file that another study made, Snakemake only knows that it exists."""
    shared = checkout.folder / "shared"
    for name in ("theirs", "ours"):
        (checkout.folder / name).mkdir()
        (checkout.folder / name / "config.json").write_text('{"model_type": "llama"}')
    source = {"kind": "local", "path": str(checkout.folder / "theirs")}
    records.write(shared / "models/Mine/model.json", {"source": source, "revision": None, "path": source["path"]})
    mine = {"models": "{Mine: {base: ./ours}}", "only": "{models: [Mine]}", "resources": "shared"}
    output = checkout.expect_failure(
        "results/dense_evaluation/Mine/evaluation_results.json", "--cores", "1", config=mine
    )
    assert "Finished jobid" not in output
    for words in ("shared/models/Mine/model.json: was made with base", "Set resources to another folder"):
        assert words in output


def test_plans_a_results_folder_named_like_a_shell_command_without_running_it(checkout):
    done = checkout.run("-n", config={"results": ODD.replace("pwned", "pwned2")})
    assert "link_training" in done.stdout
    assert not list(checkout.folder.parent.rglob("pwned*"))


def test_accepts_values_on_the_command_line(checkout):
    checkout.run("-n", "-q", config={"finetune": "{epochs: 3}", "seed": "7"})


def test_plans_the_real_study_without_a_network(checkout):
    """The training data is fetched at the start, before it is known which candidates will be trained."""
    done = checkout.run("-n", "--configfile", "config/full.yaml")
    assert "output: resources/datasets/alpaca/dataset.json" in done.stdout
