"""A snakemake that runs while a test looks on: its jobs, the CPU time they take, and their sudden end."""

import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

from .checkout import SNAKEMAKE, STUDY, alone, explained, may_be_alone, words

SCRIPT = re.compile(r"/tmp\w+\.(\w+)\.py$")
LONGEST = 1800  # seconds that a test waits for anything, on a machine however busy


class Running:
    """A snakemake that is running in `checkout`, one job at a time unless `cores` says otherwise.

    apart: without a network, where that can be had.
    """

    def __init__(self, checkout, *arguments, config=STUDY, cores=1, environment=None, apart=False):
        command = [SNAKEMAKE, "--cores", str(cores), *arguments, *words(config)]
        self.command = alone(*command) if apart and may_be_alone() else command
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
        """pid -> (script, process) of the jobs that compute now; their wrappers are none of them."""
        found = {}
        with suppress(psutil.NoSuchProcess):
            for process in self.process.children(recursive=True):
                with suppress(psutil.NoSuchProcess, IndexError):
                    line = process.cmdline()
                    if len(line) == 2 and (match := SCRIPT.search(line[1])):
                        found[process.pid] = (match[1], process)
        return found

    def wait_for(self, scripts):
        """The process of the next job with one of the `scripts`; None where the run ended without."""
        deadline = time.monotonic() + LONGEST
        while self.process.poll() is None:
            for script, process in self.jobs().values():
                if script in scripts:
                    return process
            assert time.monotonic() < deadline, self.explained()
            time.sleep(0.02)
        return None

    def wait_until(self, condition):
        """Wait for `condition()` while the run goes on."""
        deadline = time.monotonic() + LONGEST
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.explained()
            time.sleep(0.02)

    def kill(self):
        """Everything at once, as when the power fails."""
        with suppress(psutil.NoSuchProcess):
            everything = [self.process, *self.process.children(recursive=True)]
            for process in everything:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()  # so that none sees another one end
            for process in everything:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()

    def wait(self):
        """The exit code, once it has ended by itself."""
        return self.process.wait(LONGEST)

    def ends_well(self):
        """Wait for its end; the test fails if the run does."""
        assert self.wait() == 0, self.explained()

    def text(self):
        """What it has printed."""
        return self.output.read_text(errors="replace")

    def explained(self):
        """What a person needs to know of it."""
        return explained(self.command, self.process.poll(), self.text(), self.folder)


def spent(process):
    """Seconds of CPU that a process has taken; None once it is gone."""
    try:
        times = process.cpu_times()
        return times.user + times.system if process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def wait_until(process, seconds):
    """Whether `process` is still there once it has taken so many `seconds` of CPU."""
    while (taken := spent(process)) is not None:
        if taken >= seconds:
            return True
        time.sleep(0.005)
    return False


def wait_until_it_writes(process, folder):
    """Whether a file that is not whole yet is there while `process` runs."""
    until = time.monotonic() + LONGEST
    while time.monotonic() < until and spent(process) is not None:
        for place, folders, files in os.walk(folder):
            if any(name.startswith(".partial") for name in [*folders, *files]):
                return Path(place).is_dir()
    return False


def lives(running):
    """script -> most CPU seconds that one of its jobs took, by watching a run to its end."""
    longest, seen = {}, {}
    while running.process.poll() is None:
        seen |= running.jobs()
        for pid, (script, process) in list(seen.items()):
            taken = spent(process)
            if taken is None:
                del seen[pid]
            else:
                longest[script] = max(longest.get(script, 0), taken)
        time.sleep(0.1)
    return longest


def kill_one(process):
    """End one process without a word."""
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)
