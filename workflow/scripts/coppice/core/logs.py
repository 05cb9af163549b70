"""Show a user what jobs do while they run: the log of each job, its progress and its status file.

Every script runs inside `job`. It sets the thread count before torch is imported, sends log lines to the rule's log
file and the terminal, and keeps a small status file up to date for `coppice show`. If a job fails for a reason that the
user can fix, it ends with that reason instead of a traceback. Such a failure is final within its run: if Snakemake
tries the job again, it ends at once, because no exit status tells `--retries` to stop.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TextIO, TypeVar

from . import disks, locks
from .aliases import PathLike
from .errors import CoppiceError, Stopped, is_final
from .json_text import parsed
from .records import atomic
from .secrets import redacted

LINE = "%(asctime)s %(levelname)s %(message)s"
SECONDS_BETWEEN_LINES = 10
T = TypeVar("T")
RUN = "COPPICE_RUN"  # the workflow sets it: the call of Snakemake that a job belongs to
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
INTERRUPTED = 128 + signal.SIGINT  # the exit status that shells give after Ctrl-C
UNCOUNTED = {"HF_UPDATE_DOWNLOAD_COUNTS": "0"}  # otherwise `datasets` calls a server even for a local file


@contextmanager
def job(
    log: PathLike,
    threads: int = 1,
    status: PathLike | None = None,
    title: str = "",
    fetches: bool = False,
) -> Iterator[_Status]:
    """Run the block as one job of the workflow, with a log, a thread limit and a status file.

    One process at a time runs a job; a second one waits for the first.

    Args:
        log: the job's log file.
        threads: the number of threads that numerical libraries may use.
        status: the status file; by default it lies beside the log.
        title: the name of the job in its status file.
        fetches: whether this job may use the hub. All other jobs run offline: the fetch rules have brought what they
            need.

    Yields:
        A function that writes a state of the job to its status file.

    Raises:
        SystemExit: with 1 after a `CoppiceError` or on a full disk, with 130 after Ctrl-C. The message is in the log
            and on the terminal. If the job already failed for good in this run, it ends with 1 before the block.
    """
    keep = _Status(status or status_beside(log), title)
    with _explaining_failures(Path(log).parent), locks.alone(log):
        if reason := keep.final_reason():
            start_logging(log, own_terminal=True)
            message = "%s\nNot retried: another attempt in this run would fail in the same way."
            logging.getLogger("coppice").error(message, reason)
            raise SystemExit(1)
        with _explaining_failures(Path(keep.path).parent, keep):
            os.environ.update(UNCOUNTED if fetches else OFFLINE)
            gc.set_threshold(100_000, 50, 100)  # a third of the time of importing torch and transformers is collection
            limit_threads(threads)
            start_logging(log, own_terminal=True)
            keep("running")
            yield keep
            keep("done")
    gc.freeze()  # otherwise Python's last collection, over all of torch's objects, delays the exit by a second


def status_beside(log: PathLike) -> Path:
    """Return the status file of a job that keeps it beside its log."""
    return Path(log).with_suffix(".status.json")


@contextmanager
def _explaining_failures(folder: PathLike, keep: _Status | None = None) -> Iterator[None]:
    """If the block ends early, report the reason on the terminal, in the log and in the status file.

    An error that the user can fix, and Ctrl-C, become one line and a SystemExit. Any other exception is raised again.

    Args:
        folder: where the job probably wrote, for an error of a full disk that names no file.
        keep: writes the status file; None as long as that file may be another process's.
    """
    try:
        yield
    except SystemExit as error:
        if keep:
            keep("failed", reason=f"ended with exit status {error.code}")
        raise
    except BaseException as error:
        code, state, message = _outcome(error, folder)
        logging.getLogger("coppice").error("%s", message or traceback.format_exc())
        if keep:
            final = isinstance(error, CoppiceError) and is_final(error)
            keep(state, reason=message or f"{type(error).__name__}: {error}", final=final)
        if message is None:
            raise
        raise SystemExit(code) from None


def _outcome(error: BaseException, folder: PathLike) -> tuple[int, str, str | None]:
    """Return (exit status, state, message or None) for a job that ends with `error`."""
    if isinstance(error, KeyboardInterrupt):
        message = "stopped by an interrupt (Ctrl-C). Run the same command again to continue from what is finished."
        return INTERRUPTED, "stopped", message
    if isinstance(error, CoppiceError):
        return 1, "stopped" if isinstance(error, Stopped) else "failed", str(error)
    return 1, "failed", disks.explained(error, [str(folder)])


def limit_threads(threads: int) -> None:
    """Limit every numerical library to `threads`, or to the cores that this process may use if there are fewer.

    Call this before torch is imported: OpenMP reads the environment only once.
    """
    count = str(max(1, min(int(threads), len(os.sched_getaffinity(0)))))
    for name in (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "NUMEXPR_NUM_THREADS",
        "RAYON_NUM_THREADS",
    ):
        os.environ[name] = count
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(int(count))


def start_logging(log: PathLike | None = None, own_terminal: bool = False, append: bool = False) -> None:
    """Log lines of level INFO and above to the file `log`, and Coppice's own lines to the terminal too.

    Args:
        log: the log file; None for the terminal alone.
        own_terminal: send everything else on stderr (warnings and progress bars of libraries, output of native code)
            to the log file only. Several jobs share one terminal, and their bars would overwrite each other.
        append: keep what is in the file, because another process writes to it, too.
    """
    terminal = sys.stderr
    if log and own_terminal:
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        terminal = os.fdopen(os.dup(2), "w", buffering=1)
        captured = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        os.dup2(captured, 2)
        os.close(captured)
        # never undone: what Python writes as it exits, such as an uncaught exception, belongs to the log, too
        sys.stderr = _Stream(sys.stderr, log)
        os.environ.setdefault("TQDM_MININTERVAL", str(SECONDS_BETWEEN_LINES))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for handler in list(root.handlers):
        root.removeHandler(handler)
    if log:
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(log, mode="a" if own_terminal or append else "w", encoding="utf-8")
        file.setFormatter(_Formatter(LINE))
        root.addHandler(file)
    lines = logging.StreamHandler(terminal)
    lines.setFormatter(_Formatter("%(message)s"))
    lines.addFilter(lambda record: record.name.startswith("coppice") or record.levelno >= logging.ERROR)
    root.addHandler(lines)
    logging.captureWarnings(True)
    for noisy in ("httpx", "fsspec", "filelock", "urllib3", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _Formatter(logging.Formatter):
    """Remove secrets from log lines and from the tracebacks below them."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


class _Stream:
    """A stream of text or bytes into the file `path` that removes secrets and whose errors name the file.

    In every other respect it behaves like the stream that it wraps.
    """

    def __init__(self, stream: IO, path: PathLike) -> None:
        self._stream, self._path = stream, path

    def write(self, text: str | bytes) -> int:
        with disks.naming(self._path):
            if isinstance(text, str):
                return self._stream.write(redacted(text))
            self._stream.write(redacted(bytes(text).decode(errors="surrogateescape")).encode(errors="surrogateescape"))
            return len(text)

    def flush(self) -> None:
        with disks.naming(self._path):
            self._stream.flush()

    def writelines(self, lines: Iterable[str | bytes]) -> None:
        for line in lines:
            self.write(line)

    @property
    def buffer(self) -> _Stream:
        return _Stream(self._stream.buffer, self._path)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def progress(items: Iterable[T], label: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yield `items`, with a progress bar on a terminal and a plain line every ten seconds in the log."""
    from tqdm import tqdm

    total = len(items) if total is None and hasattr(items, "__len__") else total
    screen = _terminal()
    with (
        ProgressLines(label, total, unit) as lines,
        tqdm(items, desc=label, total=total, unit=unit, file=screen, leave=False, disable=not screen.isatty()) as bar,
    ):
        for item in bar:
            yield item
            lines.advance()


def _terminal() -> TextIO:
    """Return the stream of the terminal's log lines; stderr if logging has not started."""
    # compare types exactly: the handler of the log file is a StreamHandler, too
    streams = [h.stream for h in logging.getLogger().handlers if type(h) is logging.StreamHandler]
    return streams[0] if streams else sys.stderr


class ProgressLines:
    """Log progress in plain lines (done, rate, time left), at most one in ten seconds.

    Args:
        label: what is done, at the beginning of each line.
        total: the number of units, None if it is not known.
        unit: their name.
    """

    def __init__(self, label: str, total: int | None = None, unit: str = "it") -> None:
        """Start the clock."""
        self.label, self.total, self.unit = label, total, unit
        self.done, self.started, self.last_line = 0, time.monotonic(), time.monotonic()
        self.logger = logging.getLogger("progress")

    def __enter__(self) -> ProgressLines:
        """Return the object itself, for `with`."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Log the total, unless an exception ended the block."""
        if exception[0] is None:
            self.logger.info("%s: %d %s in %.1f s", self.label, self.done, self.unit, time.monotonic() - self.started)

    def advance(self, count: int = 1) -> None:
        """Count `count` more units as done, and log a line if the last one is ten seconds old."""
        self.done += count
        now = time.monotonic()
        if now - self.last_line < SECONDS_BETWEEN_LINES:
            return
        self.last_line = now
        rate = self.done / (now - self.started)
        of = f"/{self.total}, {(self.total - self.done) / rate:.0f} s left" if self.total else ""
        self.logger.info("%s: %d%s (%.1f %s/s)", self.label, self.done, of, rate, self.unit)


class _Status:
    """The status file of one job: {title, state, reason, final, run, started, updated, device, host, pid}."""

    def __init__(self, path: PathLike, title: str) -> None:
        self.path, self.title, self.started = path, title, time.time()

    def final_reason(self) -> str | None:
        """Return why an earlier attempt in this run failed for good; None if there was no such attempt."""
        try:
            facts = parsed(Path(self.path).read_text(encoding="utf-8"))
            of_this_run = facts["run"] is not None and facts["run"] == os.environ.get(RUN)
            return facts["reason"] if facts["final"] and of_this_run else None
        except (OSError, ValueError, KeyError, TypeError):  # there is no file, or it is damaged
            return None

    def __call__(self, state: str, reason: str | None = None, final: bool = False) -> None:
        facts = {"title": self.title, "state": state, "reason": redacted(reason)}
        facts |= {"final": final, "run": os.environ.get(RUN)}
        facts |= {"started": self.started, "updated": time.time(), "device": os.environ.get("CUDA_VISIBLE_DEVICES")}
        try:
            with atomic(self.path) as file:
                json.dump(facts | {"host": socket.gethostname(), "pid": os.getpid()}, file)
        except OSError as error:  # the job's work matters more than its status file
            logging.getLogger("coppice").warning("cannot write the status file of this job: %s", error)
