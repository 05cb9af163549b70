"""What Coppice uses of Snakemake beyond its documented interface still works in the installed version."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import smart_open
from snakemake import api, common

from coppice import cli
from coppice.core.errors import SettingsError
from coppice.planning import snakemake_compat

SNAKEFILE = """
import json
from pathlib import Path
from coppice.planning import snakemake_compat as compat

def write(name, content):
    Path(name).write_text(json.dumps(content))

write("parsed.json", [compat.is_main_process(workflow), compat.is_cluster_job(workflow),
                      list(map(str, compat.configuration_files(workflow)))])

def threads(wildcards):
    # rules ask this when jobs are sized, because nothing is known while the file is parsed
    write("cluster.json", compat.uses_a_cluster(workflow))
    return 1

rule second:
    input: "first.txt"
    output: "second.txt"
    log: "second.log"
    params: status="second.json"
    shell: "exit {config[code]}; touch {output}" if config["code"] else "touch {output}"

rule first:
    output: "first.txt"
    threads: threads
    params:
        tracked=config["tracked"],
        free=compat.untracked(lambda wildcards: config["free"]),
    shell: "echo {params.tracked} {params.free} > {output}"

onstart:
    write("used.json", sorted(compat.used_outputs(workflow)))

onerror:
    write("failed.json", [[job.title, job.logs, job.status] for job in compat.failed_jobs(workflow)])
"""


@pytest.fixture
def run_workflow(tmp_path):
    """Return a function that runs the workflow above with arguments and returns the files that it wrote by name."""
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    (tmp_path / "mine.yaml").write_text("{}")
    program = str(Path(sys.executable).parent / "snakemake")

    def run(*arguments, **config):
        given = [f"{key}={value}" for key, value in config.items()]
        command = [program, "--cores", "1", "--configfile", "mine.yaml", *arguments, "--config", *given]
        environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        files = {path.name: path.read_text() for path in tmp_path.iterdir() if path.suffix in (".json", ".txt")}
        return done, {name: json.loads(text) if name.endswith("json") else text for name, text in files.items()}

    return run


def test_an_untracked_parameter_reruns_nothing_and_a_run_knows_its_jobs(run_workflow, tmp_path):
    failed, files = run_workflow(tracked=1, free=1, code=3)
    assert failed.returncode == 1 and files["used.json"] == []
    assert files["failed.json"] == [["second", ["second.log"], "second.json"]]
    done, files = run_workflow(tracked=1, free=2, code=0)
    assert done.returncode == 0, done.stdout + done.stderr
    assert files["first.txt"] == "1 1\n", "the changed parameter reran the job"
    assert files["used.json"] == ["first.txt"]
    assert files["parsed.json"] == [True, False, [str(tmp_path / "mine.yaml")]] and files["cluster.json"] is False
    planned, files = run_workflow("-n", "--executor", "slurm", "--jobs", "1", tracked=2, free=2, code=0)
    assert "rule first:" in planned.stdout + planned.stderr, "a tracked parameter reruns its job"
    assert files["cluster.json"] is True


def test_a_cluster_job_is_recognized():
    assert isinstance(api.Workflow.remote_exec, property) and isinstance(api.Workflow.is_main_process, property)


def test_snakemake_parses_uris_through_the_cache(monkeypatch):
    monkeypatch.setattr(smart_open, "parse_uri", smart_open.parse_uri)
    snakemake_compat.parse_uris_once()
    for _ in range(3):
        common.parse_uri("scripts/one.py")
    assert smart_open.parse_uri.cache_info().hits >= 2


def test_snakemake_reads_a_stored_signature():
    function = snakemake_compat.inspected_once(lambda wildcards, input: None)
    assert common.get_function_params(function) is function.__signature__.parameters
    assert inspect.signature(function) is function.__signature__


def test_config_arguments_are_parsed_as_by_snakemake():
    words = ["one=1", "two={c: [x, 2.5]}", "three=text"]
    expected = {"one": 1, "two": {"c": ["x", "2.5"]}, "three": "text"}
    assert snakemake_compat.parsed_config_arguments(words) == expected
    with pytest.raises(SettingsError, match="--config one"):
        snakemake_compat.parsed_config_arguments(["one"])


TESTED = {"9.27.1": True, "9.3.0": True, "9.28.0": False, "10.0": False}


@pytest.mark.parametrize("version", TESTED)
def test_only_an_untested_version_is_announced(version, monkeypatch):
    monkeypatch.setattr(common, "__version__", version)
    notice = snakemake_compat.untested_version()
    assert notice is None if TESTED[version] else (version in notice and "snakemake==9.27.*" in notice)


def test_the_installed_version_is_tested():
    assert snakemake_compat.untested_version() is None
