"""Errors that are meant for people.

A `CoppiceError` carries one message that names the file, key or row and says what to do. Scripts and the
command line print it without a traceback; anything else that is raised is a defect and keeps its traceback.
"""

from difflib import get_close_matches


class CoppiceError(Exception):
    """Something the user can mend: bad configuration, bad data, a missing file."""


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
