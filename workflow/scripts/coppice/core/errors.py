"""Errors that are meant for people.

A `CoppiceError` carries one message that names the file, key or row and says what to do. Scripts and the
command line print it without a traceback; anything else that is raised is a defect and keeps its traceback.
"""

import errno
import re
from difflib import get_close_matches

from .secrets import redacted

LONGEST = 2000  # characters of a message; what is left out of a longer one is its middle
# What no other attempt finds otherwise, of all that an operating system answers
PERMANENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}
# How torch speaks of memory and devices that gave out
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
_NUMBER = re.compile(r"\[Errno (\d+)\]|os error (\d+)", re.IGNORECASE)  # Python's words, and Rust's


class CoppiceError(Exception):
    """Something the user can mend: bad configuration, bad data, a missing file."""

    def __str__(self):
        """One line that any terminal can show, without secrets, whatever was quoted in the message."""
        # as it came too: a key of several lines would not be known for one by then
        text = redacted(printable(redacted(super().__str__())))
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 2 :]}"


class TransientError(CoppiceError):
    """Memory, time, a device or the network gave out: another attempt may end well, with more of it or by itself."""


class Stopped(TransientError):
    """Somebody, or a scheduler, asked the job to end; another attempt goes on from what is finished."""


class SettingsError(CoppiceError):
    """The configuration is wrong; the message names the key."""


class DataError(CoppiceError):
    """A dataset is missing, empty or not what it should be; the message names the file and column."""


class CheckpointError(CoppiceError):
    """A model folder or adapter cannot be used as it stands; the message names the folder and tensors."""


def nearest(name, valid):
    """A hint `; did you mean 'x'?` for a mistyped name, or '' where nothing valid is close."""
    close = get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def printable(text):
    r"""`text` as one line without control characters: line breaks become spaces, what else cannot be shown `\x1b`.

    Names, rows and models' answers may hold escape codes that move a terminal's cursor or change what it shows.
    """
    line = re.sub(r"\s*[\r\n]+\s*", " ", str(text).strip())
    return "".join(c if c.isprintable() else " " if c == "\t" else ascii(c)[1:-1] for c in line)


def is_final(error):
    """Whether another attempt at the same job would fail alike.

    So does what the user can mend, unless memory, time, a disk, a device or the network was behind it. Of what nobody
    foresaw that is not known.
    """
    return isinstance(error, CoppiceError) and not any(map(_may_pass, causes(error)))


def causes(error):
    """An error and what it came from: libraries wrap what happened, and `from None` hides it in tracebacks only."""
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    return seen


def system_number(error):
    """The operating system's number of an error, from its text where a library raised one of its own; else None."""
    number = getattr(error, "errno", None)
    if number is None and (found := _NUMBER.search(str(error))):
        number = int(found[1] or found[2])
    return number


def _may_pass(error):
    if isinstance(error, CoppiceError):  # what it quotes is among its causes
        return isinstance(error, TransientError)
    if (number := system_number(error)) is not None:
        return number not in PERMANENT
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in DEVICE_FAILED)
    return isinstance(error, MemoryError)
