"""Which check of a grid each of its points is in: one job checks all points of a model that were new at the time.

A point stays in the check that it was first planned with. So a point that is added, or changed, has a check of its own,
which looks at all points again, and what rests on the checks of before is not made anew.
"""

from pathlib import Path

from coppice.core import records


class Checks:
    """The checks of `grids` (a list of candidate -> point); the record `path` remembers those of earlier runs.

    What is not noted, as by a dry run or a cluster's job, comes out the same by itself. Raises RecordError for a note
    that is damaged: without it, points that came later would be taken for new, and all of the grid pruned again.
    """

    def __init__(self, path, grids):
        self.path = path
        try:
            remedy = "put a copy of it back, or delete it: grids that have grown are then pruned anew"
            self._noted = records.read(path, remedy)["checks"]
        except records.MissingRecord:
            self._noted = {}
        self._checks = dict(self._noted)
        self._looked_at = {}
        for grid in grids:
            new = [key for key in (_key(*one) for one in grid.items()) if key not in self._checks]
            self._checks |= dict.fromkeys(new, _digest(new))

    def keep(self):
        """Note the checks for later runs."""
        if len(self._checks) > len(self._noted):
            records.write(self.path, {"checks": self._checks})
            self._noted = dict(self._checks)

    def record(self, pattern, candidate, point):
        """The record that a model takes a point: `pattern` with {check} filled in.

        A point that was taken out of the grid before its check was made, and is back now, has another one.
        """
        key = _key(candidate, point)
        first = pattern.format(check=self._checks[key])
        again = pattern.format(check=_digest([self._checks[key], key]))
        if Path(again).exists():
            return again
        looked_at = self._candidates_of(first)
        return first if looked_at is None or candidate in looked_at else again

    def _candidates_of(self, record):
        """The candidates that a check looked at; None where it has not been made."""
        if record not in self._looked_at:
            try:
                self._looked_at[record] = set(records.read(record)["plans"])
            except (records.RecordError, KeyError):
                self._looked_at[record] = None
        return self._looked_at[record]


def _key(candidate, point):
    return f"{candidate} {_digest(point)}"


def _digest(content):
    return records.digest(content)[:12]
