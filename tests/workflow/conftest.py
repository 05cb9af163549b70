"""Fixtures that run the workflow for real, in copies of the tree, with no network and no GPU."""

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SHIPPED = ("Snakefile", "workflow", "config", "profiles", "envs")

# What no file may hold: recognisable secrets in the environment of every run
SECRETS = {"HF_TOKEN": "hf_PlantedTokenOfTheTests", "WANDB_API_KEY": "5ec2e7" * 6 + "cafe"}
OFF = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")  # the workflow has to see to it by itself

# A study that ends in a minute: one model, trained and tuned for a few steps, on a few items a task.
SMALL = {
    "only": "{models: [Mistral]}",
    "miniature": "{steps: 40}",
    "finetune": "{max_steps: 4, eval_steps: 2, save_steps: 2, warmup_steps: 1, data: {val_size: 20}}",
    "evaluate": "{zero_shot: {limit: 20, tasks: [piqa, arc_easy]}}",
    "candidates": "{prune: [{method: depth, ratio: 0.34}, {method: width, ratio: 0.5, importance: magnitude}]}",
}


def pytest_collection_modifyitems(items):
    """Everything in this folder runs the workflow for real."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("workflow")


@functools.cache
def may_be_alone():
    """Whether a process without any network but its own loopback device can be made here."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(alone("true"), capture_output=True, check=False).returncode == 0


def alone(*command):
    """`command` in a network of its own."""
    return ["unshare", "-rn", sys.executable, str(HERE / "alone.py"), *command]


@dataclass
class Checkout:
    """A copy of the workflow in a folder of its own, and a way to run snakemake there as a user would.

    No run may look up or connect to anything outside this machine; `watched` tells of every Python process of the runs.
    """

    folder: Path

    @property
    def watch(self):
        """The file in which processes note what they do; see watch/sitecustomize.py."""
        return self.folder.with_name(f"{self.folder.name}.watch")

    def watched(self, kind):
        """[(what, command line)] of the notes of one kind: started, outside, hub."""
        if not self.watch.exists():
            return []
        notes = map(json.loads, self.watch.read_text().splitlines())
        return [(what, " ".join(command)) for found, what, command in notes if found == kind]

    def environment(self):
        """What runs see: no switch of the hub, secrets, and the watch in every Python process."""
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTEST_CURRENT_TEST", *OFF)}
        places = {"PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(HERE / "watch")}
        paths = {name: os.pathsep.join(filter(None, [first, kept.get(name)])) for name, first in places.items()}
        return kept | SECRETS | paths | {"COPPICE_TEST_WATCH": str(self.watch)}

    def snakemake(self, *arguments, config=None, timeout=1500, cwd=None, apart=False):
        """Run snakemake; `config` becomes `--config key=value` words. Its output, errors too, is in `stdout`.

        apart: without a network, where that can be had.
        """
        words = ["--config", *(f"{key}={value}" for key, value in config.items())] if config else []
        command = [str(Path(sys.executable).parent / "snakemake"), *arguments, *words]
        done = subprocess.run(
            alone(*command) if apart and may_be_alone() else command,
            cwd=cwd or self.folder,
            env=self.environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
        )
        assert not self.watched("outside")
        return done

    def shell(self, command):
        """Run a shell command as a user would in the folder; the test fails where it does."""
        subprocess.run(command, shell=True, cwd=self.folder, env=self.environment(), check=True)

    def run(self, *arguments, **options):
        """The same, and the test fails with Snakemake's words where it does not end well."""
        done = self.snakemake(*arguments, **options)
        assert done.returncode == 0, done.stdout[-8000:]
        return done


@pytest.fixture(scope="session")
def new_checkout(tmp_path_factory):
    """A function that makes a fresh copy of what a user clones."""

    def make(name="checkout"):
        folder = tmp_path_factory.mktemp(name)
        for part in SHIPPED:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder / part)
        return Checkout(folder)

    return make


def made_once(tmp_path_factory, name, make):
    """What `make()` returned, to be called by one of a test run's processes and kept as JSON for all of them."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    note = shared / f"{name}.json"
    with FileLock(shared / f"{name}.lock"):
        if not note.exists():
            note.write_text(json.dumps(make()))
    return json.loads(note.read_text())


@pytest.fixture(scope="session")
def small_study(new_checkout, tmp_path_factory):
    """The small study, run to its end once, for all tests that look at it or change it back: each process of a test run
    has a copy of its own.
    """

    def make():
        checkout = new_checkout("untouched")
        checkout.run("--cores", "2", config=SMALL, apart=True)
        return str(checkout.folder)

    untouched = Checkout(Path(made_once(tmp_path_factory, "small-study", make)))
    own = Checkout(tmp_path_factory.mktemp("small") / "study")
    shutil.copytree(untouched.folder, own.folder, symlinks=True)
    shutil.copy(untouched.watch, own.watch)
    return own
