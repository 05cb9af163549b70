"""What a person follows while jobs run: the log of each job, its progress and its status file.

`job` is the frame of every script: it sets the thread count before torch is imported, sends log lines to the rule's
log file and the terminal, keeps a small status file up to date for `coppice show`, and ends a job that failed for a
reason the user can mend with that reason instead of a traceback. Such a failure is final for the run that it happened
in: when Snakemake tries the job again, it ends at once (`--retries` knows no exit status that would say so).
"""

import gc
import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

from . import disks, locks
from .errors import CoppiceError, Stopped, is_final
from .json_text import parsed
from .records import atomic
from .secrets import redacted

LINE = "%(asctime)s %(levelname)s %(message)s"
SECONDS_BETWEEN_LINES = 10
RUN = "COPPICE_RUN"  # set by the workflow: which call of snakemake a job belongs to
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
INTERRUPTED = 128 + signal.SIGINT  # the exit status that shells give after Ctrl-C
UNCOUNTED = {"HF_UPDATE_DOWNLOAD_COUNTS": "0"}  # else `datasets` calls a server for every local file too


@contextmanager
def job(log, threads=1, status=None, title="", unused=(), fetches=False):
    """Run one job of the workflow: logging to `log`, torch bound to `threads`, `status` kept while it runs.

    status: its file, by default beside the log. unused: packages that other libraries would import where they are
    installed, and this job has no use for. fetches: this job may use the hub, which is switched off for all others: the
    fetch rules have brought what they need. Yields a function that notes a state of the job. Raises SystemExit(1) after
    a `CoppiceError` and where a disk is full, SystemExit(130) after Ctrl-C, with the message in the log and on the
    terminal; before anything is computed where the same run has seen the job fail for good. One process at a time runs
    a job: another one waits.
    """
    keep = _Status(status or status_beside(log), title)
    with _explaining_failures(Path(log).parent), locks.alone(log):
        if reason := keep.final_reason():
            start_logging(log, own_terminal=True)
            logging.getLogger("coppice").error("%s\nnot tried again: another attempt would fail alike", reason)
            raise SystemExit(1)
        with _explaining_failures(Path(keep.path).parent, keep):
            os.environ.update(UNCOUNTED if fetches else OFFLINE)
            _start_quickly(unused)
            limit_threads(threads)
            start_logging(log, own_terminal=True)
            keep("running")
            yield keep
            keep("done")
    gc.freeze()  # else a second goes by on the way out, in a last look through torch's objects


def status_beside(log):
    """The status file of a job that keeps it beside its log."""
    return Path(log).with_suffix(".status.json")


@contextmanager
def _explaining_failures(folder, keep=None):
    """Have a job that ends early say why, on the terminal and in its log and by `keep` in its status, where these are
    its own by then. What the user can mend, and Ctrl-C, are told in a line; the rest is raised on.

    folder: where it probably wrote, should a disk be full and the error name no file.
    """
    try:
        yield
    except SystemExit as error:
        if keep:
            keep("failed", reason=f"ended with exit status {error.code}")
        raise
    except BaseException as error:
        code, state, said = _judged(error, folder)
        logging.getLogger("coppice").error("%s", said or traceback.format_exc())
        if keep:
            final = isinstance(error, CoppiceError) and is_final(error)
            keep(state, reason=said or f"{type(error).__name__}: {error}", final=final)
        if said is None:
            raise
        raise SystemExit(code) from None


def _judged(error, folder):
    """(exit status, state, message or None) of a job that ends with `error`."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "stopped", "stopped, as asked; the same command goes on from what is finished"
    if isinstance(error, CoppiceError):
        return 1, "stopped" if isinstance(error, Stopped) else "failed", str(error)
    return 1, "failed", disks.in_words(error, [str(folder)])


def _start_quickly(unused):
    """Imports are most of a short job: of seven seconds for fine-tuning's, two and a half go by in collecting garbage,
    at their end too, and in bitsandbytes, which peft imports where it is installed."""
    gc.set_threshold(100_000, 50, 100)
    for package in unused:
        sys.modules.setdefault(package, None)  # as if it were not installed


def limit_threads(threads):
    """Bind every numerical library to `threads`, or to the cores this process may use where those are fewer.

    Has to run before torch is imported: OpenMP reads the environment once.
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


def start_logging(log=None, own_terminal=False, append=False):
    """Log lines of level INFO and above to the file `log`, Coppice's own lines to the terminal too.

    With `own_terminal`, whatever else is written to stderr (libraries' warnings and progress bars, native code) goes
    to the log file alone: several jobs share one terminal, and their bars would write over each other. `append`: the
    file is another process's too, and goes on.
    """
    terminal = sys.stderr
    if log and own_terminal:
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        terminal = os.fdopen(os.dup(2), "w", buffering=1)
        captured = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        os.dup2(captured, 2)
        os.close(captured)
        # to the end of the process: its last words, the traceback of what nobody caught, come after the job
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
    """Lines, and the tracebacks under them, without secrets."""

    def format(self, record):
        return redacted(super().format(record))


class _Stream:
    """A stream of text or bytes into the file `path`: nothing secret is written to it, and its errors name the file.
    In all else it is the one that it stands for."""

    def __init__(self, stream, path):
        self._stream, self._path = stream, path

    def write(self, text):
        with disks.naming(self._path):
            if isinstance(text, str):
                return self._stream.write(redacted(text))
            self._stream.write(redacted(bytes(text).decode(errors="surrogateescape")).encode(errors="surrogateescape"))
            return len(text)

    def flush(self):
        with disks.naming(self._path):
            self._stream.flush()

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    @property
    def buffer(self):
        return _Stream(self._stream.buffer, self._path)

    def __getattr__(self, name):
        return getattr(self._stream, name)


def progress(items, label, total=None, unit="it"):
    """Iterate over `items`: a bar with rate and time left on a terminal, a plain line every ten seconds in the log."""
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


def _terminal():
    """The stream of the terminal's log lines; stderr where logging was not started."""
    streams = [h.stream for h in logging.getLogger().handlers if type(h) is logging.StreamHandler]
    return streams[0] if streams else sys.stderr


class ProgressLines:
    """Plain progress lines in the log: how far, how fast, how long it will still take; at most one in ten seconds."""

    def __init__(self, label, total=None, unit="it"):
        self.label, self.total, self.unit = label, total, unit
        self.done, self.started, self.spoken = 0, time.monotonic(), time.monotonic()
        self.logger = logging.getLogger("progress")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if exception[0] is None:
            self.logger.info("%s: %d %s in %.1f s", self.label, self.done, self.unit, time.monotonic() - self.started)

    def advance(self, count=1):
        """Count `count` more units as done, and say so when the last line is ten seconds old."""
        self.done += count
        now = time.monotonic()
        if now - self.spoken < SECONDS_BETWEEN_LINES:
            return
        self.spoken = now
        rate = self.done / (now - self.started)
        of = f"/{self.total}, {(self.total - self.done) / rate:.0f} s left" if self.total else ""
        self.logger.info("%s: %d%s (%.1f %s/s)", self.label, self.done, of, rate, self.unit)


class _Status:
    """The status file of one job: {title, state, reason, final, run, started, updated, device, host, pid}."""

    def __init__(self, path, title):
        self.path, self.title, self.started = path, title, time.time()

    def final_reason(self):
        """Why an earlier attempt of this run failed for good; None where there was no such attempt."""
        try:
            facts = parsed(Path(self.path).read_text(encoding="utf-8"))
            of_this_run = facts["run"] is not None and facts["run"] == os.environ.get(RUN)
            return facts["reason"] if facts["final"] and of_this_run else None
        except (OSError, ValueError, KeyError, TypeError):  # there is none, or of an older version
            return None

    def __call__(self, state, reason=None, final=False):
        facts = {"title": self.title, "state": state, "reason": redacted(reason)}
        facts |= {"final": final, "run": os.environ.get(RUN)}
        facts |= {"started": self.started, "updated": time.time(), "device": os.environ.get("CUDA_VISIBLE_DEVICES")}
        try:
            with atomic(self.path) as file:
                json.dump(facts | {"host": socket.gethostname(), "pid": os.getpid()}, file)
        except OSError as error:  # what the job does counts for more than what is said about it
            logging.getLogger("coppice").warning("the status of this job is not kept: %s", error)
