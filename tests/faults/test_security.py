"""Weights, configurations, names and model answers from elsewhere are data: nothing in them is run."""

import ast
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from test_bad_configuration import MODEL, message_of

import coppice
from coppice import cli, models
from coppice.core import records
from coppice.data import fetching
from coppice.report import study_report
from coppice.report.study_report import job_status
from coppice.stages.prune import candidates
from coppice.study import settings

PACKAGE = Path(coppice.__file__).parent
EVIL = (
    "<script>alert(1)</script><img src=x onerror=alert(2)> [x](javascript:alert(3)) | \x1b[31m\x1b]0;owned\x07 ` $(x)"
)


class Payload:
    """An object that makes the folder `path` when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint("llama"), tmp_path / "checkpoint")


def test_unpickling_runs_the_payload(tmp_path):
    torch.save(Payload(tmp_path / "ran"), tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_never_unpickles_weights(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Payload(tmp_path / "ran")}, checkpoint / "pytorch_model.bin")
    dense = tmp_path / "dense.json"
    records.write(dense, {"path": "/gone", "weights_fingerprint": "0" * 64})
    for read in (
        lambda: models.load(models.Source(str(checkpoint))),
        lambda: models.count_parameters(checkpoint),
        lambda: candidates.import_checkpoint(
            {"model": "A", "candidate": "x"}, checkpoint, {}, dense, tmp_path / "candidate"
        ),
        lambda: fetching.fetch_model("A", {"kind": "local", "path": str(checkpoint)}, None, tmp_path / "model.json"),
    ):
        assert str(checkpoint) in message_of(read)
    assert not (tmp_path / "ran").exists()


def test_never_unpickles_an_adapter(checkpoint, tmp_path):
    from peft import LoraConfig, get_peft_model

    source = models.Source(str(checkpoint))
    get_peft_model(models.load(source), LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({"x": Payload(tmp_path / "ran")}, tmp_path / "adapter" / "adapter_model.bin")
    assert str(tmp_path / "adapter") in message_of(lambda: models.load(source, tmp_path / "adapter"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("model_type", ["llama", "unheard-of"])
def test_does_not_run_the_code_of_an_untrusted_model(checkpoint, tmp_path, model_type):
    code = f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nfrom transformers import LlamaConfig as Config\n"
    (checkpoint / "evil.py").write_text(code)
    config = json.loads((checkpoint / "config.json").read_text()) | {"model_type": model_type}
    config["auto_map"] = {name: "evil.Config" for name in ("AutoConfig", "AutoModelForCausalLM")}
    (checkpoint / "config.json").write_text(json.dumps(config))
    path = checkpoint / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Config", "evil.Config"]}}
    path.write_text(json.dumps(tokenizer))
    message = message_of(lambda: models.load(models.Source(str(checkpoint))))
    assert message is None or str(checkpoint) in message
    message_of(lambda: models.load_tokenizer(str(checkpoint)))
    assert not (tmp_path / "ran").exists()
    assert not settings.load(MODEL).models["Llama"].trust_remote_code


def test_does_not_run_the_functions_of_a_task_definition_to_check_it(tmp_path):
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    text = "task: mine\nprocess_docs: !function evil.run\nmetric_list:\n  - metric: !function evil.run\n"
    (tmp_path / "mine.yaml").write_text(text)
    zero_shot = {"include_path": str(tmp_path), "tasks": ["mine"], "metric": {"mine": "acc"}}
    settings.load(MODEL | {"evaluate": {"zero_shot": zero_shot}, "datasets": {"mine": {"path": "a/b"}}})
    assert not (tmp_path / "ran").exists()


def calls(tree):
    """Yield (dotted name, {keyword: value}) of every call in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


# The process in which a model's programs run, if the user asks for that, after it has given up its rights
RUNS_PROGRAMS = PACKAGE / "stages/evaluate/sandbox_guard.py"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_runs_what_it_reads(path):
    for name, words in calls(ast.parse(path.read_text(encoding="utf-8"))):
        if name == "exec" and path == RUNS_PROGRAMS:
            continue
        assert name not in ("eval", "exec", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load"), name
        assert (
            words.get("shell") != "True"
            and "allow_pickle" not in words
            and not name.endswith(("read_pickle", "extractall", "unpack_archive"))
        ), name
        if name in ("yaml.load", "yaml.compose", "yaml.parse"):
            assert words["Loader"] in ("LOADER", "loader"), name
        if name == "torch.load":
            assert words["weights_only"] == "True", name
        assert words.get("trust_remote_code") != "True", name  # it may be passed on, but never set to True


def test_every_yaml_loader_is_safe():
    import yaml

    from coppice.study.settings import config_files, task_metrics

    safe = (yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    assert config_files.LOADER in safe and task_metrics.LOADER in safe


@pytest.fixture
def study(tmp_path):
    """Return the results of a study in which everything that others may have written is hostile."""
    results = tmp_path / "results"
    folders = {
        stage: results / f"{stage}_evaluation" / "Llama" / config
        for stage, config in (("pruned", "best_acc"), ("finetuned", "best_acc_finetuned"))
    }
    for stage, folder in folders.items():
        records.write(
            folder / "evaluation_results.json",
            {
                "stage": stage,
                "perplexity": {EVIL: {"value": 2.0, "protocol": {"name": EVIL}}},
                "zero_shot": {},
                "average_acc": 0.5,
                "parameters": 1,
            }
            | {"provenance": {"device": EVIL, "versions": {EVIL: EVIL}, "seed": 1, "settings": {}, "fingerprints": {}}},
        )
    (results / "candidates.tsv").write_text(f"model\tcandidate\t{EVIL}\nLlama\t{EVIL}\t1\n")
    (results / ".status").mkdir()
    failed = {"title": "finetune Llama best_acc \x1b[31m", "state": "failed", "updated": 2}
    failed["reason"] = f"{EVIL}\n# {EVIL}"
    (results / ".status" / "x.json").write_text(json.dumps(failed | {"started": 1}))
    (results / "for_finetuning" / "\x1b[31mred" / "best_acc").mkdir(parents=True)
    records.write(results / "for_finetuning" / "\x1b[31mred" / "best_acc" / "selection_info.json", {"candidate": EVIL})
    return results


def test_the_report_escapes_hostile_text(study, tmp_path):
    pairs = [("Llama", "best_acc")]
    facts = {"Llama": {"variant": "base", "family": EVIL, "base": EVIL}}
    study_report.write_report(study, pairs, facts, tmp_path / "report", {EVIL: EVIL})
    page, text = ((tmp_path / "report" / f"study_report.{kind}").read_text() for kind in ("html", "md"))
    for document in (page, text):
        assert "<script>alert" not in document and "<img" not in document and "&lt;script&gt;alert(1)" in document
    assert page.count("<script>") == 1 and "Content-Security-Policy" in page
    reasons = [line for line in text.splitlines() if "alert(1)" in line]
    assert reasons and not any(line.startswith("# ") for line in reasons)


def test_the_terminal_gets_no_escape_codes(study, capsys):
    assert cli.main(["show", str(study)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\x07" not in shown and "Llama" in shown
    job = job_status.Statuses(study).jobs[0]
    assert "\x1b" not in f"{job.reason}{job.state}{job.names}"
    assert cli.main(["show", f"{study}\x1b[2J"]) == 1
    assert "\x1b" not in capsys.readouterr().err


def test_a_summary_escapes_the_names_of_a_users_columns(tmp_path):
    from coppice.stages.select import summary

    assert "<b>" not in summary._cell("<b>x|y</b>") and "\\|" in summary._cell("<b>x|y</b>")


def test_records_hold_the_names_of_trackers_but_not_their_keys(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    finetune = settings.load(MODEL | {"finetune": {"report_to": ["wandb"]}}).finetune.model_dump()
    records.write(tmp_path / "a.json", records.Clock().provenance(finetune, 1) | {"env": dict(os.environ)})
    text = (tmp_path / "a.json").read_text()
    assert '"wandb"' in text and "0123456789abcdef" not in text
