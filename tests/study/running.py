"""Run snakemake while a test watches its jobs, measures their CPU time and kills them."""

import os
import re
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

from .checkout import SNAKEMAKE, STUDY, can_isolate_network, config_arguments, failure_report, without_network

SCRIPT = re.compile(r"/tmp\w+\.(\w+)\.py$")
LONGEST = 1800  # seconds after which a test stops waiting, even on a busy machine


class Running:
    """A snakemake that runs in `checkout`, one job at a time unless `cores` says otherwise.

    offline: run it without a network, if this machine can do that
    """

    def __init__(self, checkout, *arguments, config=STUDY, cores=1, environment=None, offline=False):
        command = [SNAKEMAKE, "--cores", str(cores), *arguments, *config_arguments(config)]
        self.command = without_network(*command) if offline and can_isolate_network() else command
        self.folder = checkout.folder
        self.output = checkout.folder / "run.log"
        with open(self.output, "w") as log:
            self.process = psutil.Popen(
                self.command,
                cwd=checkout.folder,
                env=checkout.environment() | (environment or {}),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.kill()

    def jobs(self):
        """Return {pid: (script, process)} of the jobs that compute now, without their wrapper processes."""
        found = {}
        with suppress(psutil.NoSuchProcess):
            for process in self.process.children(recursive=True):
                with suppress(psutil.NoSuchProcess, IndexError):
                    line = process.cmdline()
                    if len(line) == 2 and (match := SCRIPT.search(line[1])):
                        found[process.pid] = (match[1], process)
        return found

    def wait_for(self, scripts):
        """Return the process of the next job of one of the `scripts`, or None if the run ends first."""
        deadline = time.monotonic() + LONGEST
        while self.process.poll() is None:
            for script, process in self.jobs().values():
                if script in scripts:
                    return process
            assert time.monotonic() < deadline, self.failure_report()
            time.sleep(0.02)
        return None

    def wait_until(self, condition):
        """Wait until `condition()` is true; the test fails if the run ends first."""
        deadline = time.monotonic() + LONGEST
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.failure_report()
            time.sleep(0.02)

    def kill(self):
        """Kill snakemake and all its jobs at once, as a power failure would."""
        with suppress(psutil.NoSuchProcess):
            everything = [self.process, *self.process.children(recursive=True)]
            for process in everything:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()  # so that no process can react to the end of another
            for process in everything:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()

    def wait(self):
        """Wait for the end of the run and return its exit code."""
        return self.process.wait(LONGEST)

    def succeeds(self):
        """Wait for the end of the run; the test fails if the run failed."""
        assert self.wait() == 0, self.failure_report()

    def text(self):
        """Return what the run has printed so far."""
        return self.output.read_text(errors="replace")

    def failure_report(self):
        """Return what a person needs to debug this run."""
        return failure_report(self.command, self.process.poll(), self.text(), self.folder)


def cpu_seconds(process):
    """Return the CPU seconds that a process has used, or None if it has ended."""
    try:
        times = process.cpu_times()
        return times.user + times.system if process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def wait_for_cpu_seconds(process, seconds):
    """Wait until `process` has used `seconds` of CPU time; return False if it ends first."""
    while (used := cpu_seconds(process)) is not None:
        if used >= seconds:
            return True
        time.sleep(0.005)
    return False


def wait_for_partial_file(process, folder):
    """Wait until a file or folder is half written; return False if `process` ends first."""
    until = time.monotonic() + LONGEST
    while time.monotonic() < until and cpu_seconds(process) is not None:
        for place, folders, files in os.walk(folder):
            if any(name.startswith(".partial") for name in [*folders, *files]):
                return Path(place).is_dir()
    return False


def longest_cpu_seconds(running):
    """Watch a run to its end and return {script: CPU seconds of that script's longest job}."""
    longest, seen = {}, {}
    while running.process.poll() is None:
        seen |= running.jobs()
        for pid, (script, process) in list(seen.items()):
            used = cpu_seconds(process)
            if used is None:
                del seen[pid]
            else:
                longest[script] = max(longest.get(script, 0), used)
        time.sleep(0.1)
    return longest
