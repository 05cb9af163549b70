"""Set the seed of the random moments at which the fault tests kill jobs."""

import os
import random


def pytest_configure(config):
    """Share one seed among all processes of a test run: COPPICE_FAULTS_SEED, else a new one."""
    os.environ.setdefault("COPPICE_FAULTS_SEED", str(random.SystemRandom().randrange(10**6)))


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"moments of the faults: COPPICE_FAULTS_SEED={os.environ['COPPICE_FAULTS_SEED']}")
