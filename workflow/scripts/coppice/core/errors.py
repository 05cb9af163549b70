"""Errors whose message a user can act on.

The message of a `CoppiceError` names the file, key or row and says what to do. Scripts and the command line print it
without a traceback. Every other exception is a bug and keeps its traceback.
"""

import errno
import re
from collections.abc import Iterable
from difflib import get_close_matches

from .secrets import redacted

LONGEST = 2000  # characters of a message; a longer one loses its middle
# Errors of the operating system that would occur again in another attempt
PERMANENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}
# How torch's errors describe exhausted memory and failed devices
DEVICE_FAILED = (
    "out of memory",
    "can't allocate memory",
    "CUDA error",
    "CUDA unknown error",
    "CUDA driver",
    "No CUDA GPUs",
    "CUBLAS_STATUS",
    "NCCL error",
)
_NUMBER = re.compile(r"\[Errno (\d+)\]|os error (\d+)", re.IGNORECASE)  # as Python and as Rust write it


class CoppiceError(Exception):
    """An error that the user can fix: bad configuration, bad data, a missing file."""

    def __str__(self) -> str:
        """Return the message as one line that any terminal can show, without secrets in what it quotes."""
        # redact before `printable` as well: it joins lines, and a secret of several lines would no longer match
        text = redacted(printable(redacted(super().__str__())))
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 2 :]}"


class TransientError(CoppiceError):
    """Memory, time, a device or the network gave out; another attempt may succeed, possibly with more of it."""


class Stopped(TransientError):
    """A user or a scheduler asked the job to stop; the next attempt continues from what is finished."""


class SettingsError(CoppiceError):
    """The configuration is wrong; the message names the key."""


class DataError(CoppiceError):
    """A dataset is missing, empty or malformed; the message names the file and the column."""


class CheckpointError(CoppiceError):
    """A model folder or an adapter cannot be used; the message names the folder and the tensors."""


def nearest(name: object, valid: Iterable[object]) -> str:
    """Return a hint `; did you mean 'x'?` for a mistyped name, or '' if no valid name is close."""
    close = get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def printable(text: object) -> str:
    r"""Return `text` as one line: line breaks become spaces, and unprintable characters an escape such as `\x1b`.

    Names, rows and model outputs may contain control codes that move a terminal's cursor or change what it shows.
    """
    line = re.sub(r"\s*[\r\n]+\s*", " ", str(text).strip())
    return "".join(c if c.isprintable() else " " if c == "\t" else ascii(c)[1:-1] for c in line)


def is_final(error: BaseException) -> bool:
    """Return whether another attempt at the same job would fail in the same way.

    A `CoppiceError` is final unless memory, time, a disk, a device or the network caused it. Any other exception is a
    bug whose cause is not known, so it does not count as final.
    """
    return isinstance(error, CoppiceError) and not any(map(_may_pass, causes(error)))


def causes(error: BaseException | None) -> list[BaseException]:
    """Return an error and all its causes: libraries wrap errors, and `from None` only hides causes in tracebacks."""
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    return seen


def system_number(error: BaseException) -> int | None:
    """Return the operating system's error number, from the text if a library raised its own error; else None."""
    number = getattr(error, "errno", None)
    if number is None and (found := _NUMBER.search(str(error))):
        number = int(found[1] or found[2])
    return number


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, CoppiceError):  # the error that it wraps is judged by itself, as one of the causes
        return isinstance(error, TransientError)
    if (number := system_number(error)) is not None:
        return number not in PERMANENT
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in DEVICE_FAILED)
    return isinstance(error, MemoryError)
