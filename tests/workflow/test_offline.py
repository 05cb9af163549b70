"""Without a network: only the fetch rules need one or look up hosts, and no secret is written to a file."""

import json
import re
import subprocess
import sys

import pytest

from tests.study.checkout import ROOT, SECRETS, Checkout, can_isolate_network
from tests.unit.fake_hub import serving

# The small study does not run these scripts: its models are causal miniatures, and its ablation has one stage. Other
# tests run them under the same watch.
ELSEWHERE = {
    *("fetch_config", "fetch_dataset", "fetch_model", "import_candidate", "choose_arm"),
    *("build_miniature_pictures", "build_miniature_kind", "build_miniature_code"),
}


def jobs_of(notes):
    """Return the names of the workflow's scripts in command lines."""
    found = (re.search(r"\.snakemake/scripts/tmp\w+\.(\w+)\.py", command) for _, command in notes)
    return {match[1] for match in found if match}


def test_no_job_of_a_study_looks_up_or_connects_to_other_hosts(finished):
    """Every run in the tests fails if a process does; this test makes sure that no job escapes the watch."""
    scripts = {path.stem for path in (ROOT / "workflow/scripts").glob("*.py")}
    assert jobs_of(finished.watched("started")) >= scripts - ELSEWHERE
    assert not finished.watched("outside")


def test_every_job_runs_with_the_hub_offline(finished):
    """The workflow must set this itself: the environment of these runs does not."""
    hub = [(switch, command) for switch, command in finished.watched("hub") if jobs_of([(switch, command)])]
    assert {switch for switch, _ in hub} == {"1"}
    assert {"finetune_lora", "evaluate_model", "score_candidate"} <= jobs_of(hub)


def test_finishes_a_study_without_a_network(finished):
    if not can_isolate_network():
        pytest.skip("this machine does not allow a separate network (unshare -rn)")
    assert (finished.folder / "results/report/study_report.html").is_file()


def test_writes_no_secret_from_the_environment_to_a_file(finished):
    """Looks in results, logs, Snakemake's own folder and command lines, which every user of a machine can read."""
    assert {".snakemake", "logs", "results"} <= {path.name for path in finished.folder.iterdir()}
    assert not with_secrets(finished)


def with_secrets(checkout):
    """Return the files of a checkout that contain a secret, and the file of the watch if a command line does."""
    written = [path for path in checkout.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    secrets = [secret.encode() for secret in SECRETS.values()]
    return [path for path in [*written, checkout.watch] if any(secret in path.read_bytes() for secret in secrets)]


@pytest.mark.slow
def test_fetches_a_gated_model_and_data_with_the_users_token(finished, new_checkout, monkeypatch, tmp_path):
    """A hub of the test serves them; a dataset in local files is read without a connection."""
    checkout = new_checkout("fetch")
    own = next((finished.folder / "resources/miniature/models/mistral").rglob("config.json")).parent
    tiny = {path.name: path.read_bytes() for path in own.iterdir() if path.is_file()}
    rows = [{"goal": f"g{n}", "sol1": "a", "sol2": "b", "label": n % 2} for n in range(9)]
    (checkout.folder / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "models": "{Tiny: {base: org/tiny, family: mistral}}",
        "only": "{models: [Tiny]}",
        "datasets": "{wikitext2: {path: org/texts, name: null, splits: {selection: validation, report: test}}, "
        "piqa: {path: ./piqa.jsonl, format: json}}",
        "candidates": "{prune: [{method: depth, ratio: 0.34}]}",
    }
    with serving() as (hub, address):
        commit = hub.add("org/tiny", tiny)
        texts = {f"{split}.jsonl": b'{"text": "%s"}\n' % split.encode() for split in ("train", "validation", "test")}
        hub.add("org/texts", texts, "datasets")
        hub.gated, hub.token = {"org/tiny"}, SECRETS["HF_TOKEN"]
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        checkout.run("--cores", "2", "fetch", config=config)
    resources = checkout.folder / "resources"
    assert json.loads((resources / "models/Tiny/model.json").read_text())["commit"] == commit
    assert json.loads((resources / "datasets/wikitext2/dataset.json").read_text())["source"]["commit"]
    assert (resources / "datasets/piqa/report.parquet").is_file()
    assert not with_secrets(checkout)
    assert "Nothing to be done" in checkout.run("--cores", "2", "fetch", config=config).stdout


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 9))",
        "import urllib.request; urllib.request.urlopen('http://nowhere.invalid', timeout=1)",
    ],
)
def test_the_watch_notes_a_process_that_looks_up_another_host(tmp_path, code):
    checkout = Checkout(tmp_path / "x")
    subprocess.run([sys.executable, "-c", code], env=checkout.environment(), capture_output=True, check=False)
    assert len(checkout.watched("started")) == 1 and checkout.watched("outside")
