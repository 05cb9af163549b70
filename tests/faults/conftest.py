"""Fixtures of the fault suite: the undisturbed small study that all disturbed ones are held against."""

import os
import random
from dataclasses import dataclass
from pathlib import Path

import disturbance
import pytest

from tests.workflow.conftest import Checkout, made_once, new_checkout  # noqa: F401 - a fixture


def pytest_configure(config):
    """One seed for all processes of a test run: COPPICE_FAULTS_SEED, else a new one."""
    os.environ.setdefault("COPPICE_FAULTS_SEED", str(random.SystemRandom().randrange(10**6)))


def pytest_collection_modifyitems(items):
    """So that a test run of several folders can leave out the long ones of this one alone."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("faults")


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"moments of the faults: COPPICE_FAULTS_SEED={os.environ['COPPICE_FAULTS_SEED']}")


@dataclass
class Undisturbed(Checkout):
    """A finished study, its `numbers`, and for each script the CPU seconds of its longest job."""

    numbers: dict
    lives: dict


@pytest.fixture(scope="session")
def undisturbed(new_checkout, tmp_path_factory):  # noqa: F811
    """The small study, run to its end once for all processes of a test run; nobody changes it."""

    def make():
        checkout = new_checkout("undisturbed")
        with disturbance.Running(checkout, *disturbance.TARGETS, cores=2) as running:
            lives = disturbance.lives(running)
            assert running.wait() == 0, running.text()[-8000:]
        return {"folder": str(checkout.folder), "lives": lives}

    found = made_once(tmp_path_factory, "undisturbed", make)
    folder = Path(found["folder"])
    return Undisturbed(folder, disturbance.numbers(folder), found["lives"])


@pytest.fixture
def copied(undisturbed, tmp_path):
    """A copy of the finished study, to be damaged."""
    return disturbance.copied(undisturbed, tmp_path / "study")
