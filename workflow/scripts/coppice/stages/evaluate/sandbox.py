"""Run a Python program that a model wrote, with as few rights as the machine lets us take away.

Each program runs in a process of its own with Python's standard library alone: no environment variables, an empty
folder that is deleted afterwards, and limits of time, memory, processes and file sizes. Linux further restricts it, if
it can: Landlock to that folder, and to reading Python's own files; namespaces to no network and no other process. What
the machine lacks is said by `unprotected`. A sandbox of this form is for code that does harm by mistake. Against code
written to attack, use a virtual machine.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

GUARD = Path(__file__).with_name("sandbox_guard.py")
NAMESPACES = ("unshare", "--user", "--map-root-user", "--net", "--ipc", "--pid", "--fork", "--kill-child")
PASSED, TIMED_OUT, ENDED = "passed", "timed out", "ended before its tests did"
LONGEST = 300  # bytes of a program's verdict
STARTING = 5  # seconds within which a program that is out of time must say so, the start of Python included


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: of time.
        memory: in MiB.
    """

    seconds: float = 10
    memory: int = 1024


def run(program: str, limits: Limits) -> str:
    """Run a program to its end; return PASSED, or how it failed.

    Args:
        program: Python source. It fails if it raises, exits or does not come to its end.
        limits: what it may use.
    """
    with tempfile.TemporaryDirectory(prefix="coppice-sandbox-", ignore_cleanup_errors=True) as folder:
        reading, writing = os.pipe()
        token = secrets.token_hex(16)
        words = [str(writing), token, str(limits.memory), str(limits.seconds), folder, sys.base_prefix]
        command = [*(NAMESPACES if has_namespaces() else ()), sys.executable, "-I", "-S", str(GUARD), *words]
        with open(reading, "rb") as verdict:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=folder,
                    env={"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[writing],
                    start_new_session=True,
                )
            finally:
                os.close(writing)
            try:
                process.communicate(program.encode(errors="replace"), timeout=limits.seconds + STARTING)
            except subprocess.TimeoutExpired:
                return TIMED_OUT
            finally:
                with contextlib.suppress(ProcessLookupError):  # it has ended, and so has all that it started
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            os.set_blocking(reading, False)  # a process that it left behind may hold the other end
            said = verdict.read(LONGEST) or b""
    if said == token.encode():
        return PASSED
    text = said.decode(errors="replace").replace(token, "")
    return TIMED_OUT if text == TIMED_OUT else f"failed: {text}" if text else ENDED


@functools.cache
def has_namespaces() -> bool:
    """Return whether a process may be given namespaces of its own here."""
    if shutil.which(NAMESPACES[0]) is None:
        return False
    return subprocess.run([*NAMESPACES, "true"], capture_output=True, check=False).returncode == 0


@functools.cache
def has_landlock() -> bool:
    """Return whether the kernel can restrict a process to some folders."""
    probe = [sys.executable, "-I", "-S", str(GUARD), "landlock"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def unprotected() -> list[str]:
    """Return what a program can do here that it should not, in clauses; empty if nothing is known."""
    found = [] if has_landlock() else ["read and change all files that you can (the kernel has no Landlock)"]
    if not has_namespaces():
        found.append("use the network and signal your processes (unprivileged namespaces are not allowed)")
    return found
