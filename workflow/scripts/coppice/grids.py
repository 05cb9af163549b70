"""Which check of a grid each of its points is in: one job checks all points of a model that were new at the time.

A point stays in the check that it was first planned with. So a point that is added, or changed, has a check of its own,
which looks at all points again, and what rests on the checks of before is not made anew.
"""

import contextlib
import functools
from pathlib import Path

from . import records


class Checks:
    """The checks of `grids` (a list of candidate -> point); the record `path` remembers those of earlier runs.

    keep: whether new ones are noted there. Where they are not, as in a dry run or in a cluster's job, they come out the
    same by themselves.
    """

    def __init__(self, path, grids, keep):
        self._known, self._plans = {}, functools.cache(_plans)
        with contextlib.suppress(records.RecordError):
            self._known = records.read(path)["checks"]
        before = len(self._known)
        for grid in grids:
            new = [key for key in (_key(*one) for one in grid.items()) if key not in self._known]
            self._known |= dict.fromkeys(new, _name(new))
        if keep and len(self._known) > before:
            records.write(path, {"checks": self._known})

    def record(self, pattern, candidate, point):
        """The record that a model takes a point: `pattern` with {check} filled in.

        A point that was taken out of the grid before its check was made, and is back now, has another one.
        """
        key = _key(candidate, point)
        first, again = (pattern.format(check=check) for check in (self._known[key], _name([self._known[key], key])))
        if Path(again).exists():
            return again
        checked = self._plans(first)
        return first if checked is None or candidate in checked else again


def _plans(record):
    """The candidates that a check looked at; None where it has not been made."""
    try:
        return set(records.read(record)["plans"])
    except (records.RecordError, KeyError):
        return None


def _key(candidate, point):
    return f"{candidate} {_name(point)}"


def _name(content):
    return records.digest(content)[:12]
