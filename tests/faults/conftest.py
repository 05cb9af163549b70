"""The seed of the moments at which the fault suite disturbs a study."""

import os
import random


def pytest_configure(config):
    """One seed for all processes of a test run: COPPICE_FAULTS_SEED, else a new one."""
    os.environ.setdefault("COPPICE_FAULTS_SEED", str(random.SystemRandom().randrange(10**6)))


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"moments of the faults: COPPICE_FAULTS_SEED={os.environ['COPPICE_FAULTS_SEED']}")
