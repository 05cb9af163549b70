"""Assign the points of pruning grids to grid checks. One check job covers all points that were new at the same time.

A point keeps the check that it was first planned with. A point that is added or changed later gets a new check, which
examines all points of the grid again, so that the earlier checks and everything that depends on them stay.
"""

from pathlib import Path

from coppice.core import records


class Checks:
    """The checks of several grids.

    Checks depend only on the grids and on the saved record, so a dry run or a cluster job that saves nothing assigns
    the same ones.

    Args:
        path: the record with the checks of earlier runs.
        grids: list of {candidate: point}.

    Raises:
        RecordError: the record is damaged. Without it every point would be new and the whole grid be pruned again.
    """

    def __init__(self, path, grids):
        self.path = path
        try:
            remedy = "restore a copy of it, or delete it; without it, grids that were extended are pruned again"
            self._saved = records.read(path, remedy)["checks"]
        except records.MissingRecord:
            self._saved = {}
        self._checks = dict(self._saved)
        self._checked = {}  # path of a check's record -> the candidates that it covers
        for grid in grids:
            new = [key for key in (_key(*one) for one in grid.items()) if key not in self._checks]
            self._checks |= dict.fromkeys(new, _digest(new))

    def keep(self):
        """Save the checks for later runs."""
        if len(self._checks) > len(self._saved):
            records.write(self.path, {"checks": self._checks})
            self._saved = dict(self._checks)

    def record(self, pattern, candidate, point):
        """Return the path of the check's record for a point: `pattern` with {check} filled in.

        A point that was removed from the grid before its check ran, and is now back, is not covered by that check and
        gets another one.
        """
        key = _key(candidate, point)
        first = pattern.format(check=self._checks[key])
        again = pattern.format(check=_digest([self._checks[key], key]))
        if Path(again).exists():
            return again
        covered = self._candidates_of(first)
        return first if covered is None or candidate in covered else again

    def _candidates_of(self, record):
        """Return the candidates that a check covered; None if it has not run yet."""
        if record not in self._checked:
            try:
                self._checked[record] = set(records.read(record)["plans"])
            except (records.RecordError, KeyError):
                self._checked[record] = None
        return self._checked[record]


def _key(candidate, point):
    return f"{candidate} {_digest(point)}"


def _digest(content):
    return records.digest(content)[:12]
