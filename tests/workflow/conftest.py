"""Fixtures that run the workflow for real, in copies of the tree, with no network and no GPU."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ("Snakefile", "workflow", "config", "profiles", "envs")

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


@dataclass
class Checkout:
    """A copy of the workflow in a folder of its own, and a way to run snakemake there as a user would."""

    folder: Path

    def snakemake(self, *arguments, config=None, timeout=1500, cwd=None):
        """Run snakemake; `config` becomes `--config key=value` words. Its output, errors too, is in `stdout`."""
        words = ["--config", *(f"{key}={value}" for key, value in config.items())] if config else []
        command = [str(Path(sys.executable).parent / "snakemake"), *arguments, *words]
        environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"} | {"HF_HUB_OFFLINE": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        return subprocess.run(
            command,
            cwd=cwd or self.folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
        )

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


@pytest.fixture(scope="session")
def small_study(new_checkout):
    """The small study, run to its end once for all tests that look at it or change it back."""
    checkout = new_checkout("small")
    checkout.run("--cores", "2", config=SMALL)
    return checkout
