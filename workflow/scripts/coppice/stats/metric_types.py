"""What a metric is: its name, unit, direction, place in the records, and how two models are paired by it."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from coppice.core.aliases import Json, Record

ROWS = "rows"  # one value for each row of samples/{name}.parquet; all models answer the same rows
WINDOWS = "windows"  # one loss for each window of a text; only models with the same tokenizer have the same windows
WEIGHTED = "weighted"  # a sum and a count for each row, such as loss and tokens; the value is a ratio of their totals
CORPUS = "corpus"  # statistics for each row, from whose totals the score follows
POINTS = ("%", "x100")  # units whose differences are points


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric. An entry of `metrics.METRICS` is about any data set; `on` makes a metric on one of them.

    Attributes:
        key: its name in criteria, tables and ablations. Here and in `label` and `phrase`, {} is the data set.
        section: the key of evaluation and comparison records that holds it.
        label: its name in reports.
        phrase: its name inside sentences; by default the label.
        kind: what it measures, in one or two words.
        dataset: the word for a data set that it is measured on.
        column: its heading in the terminal.
        unit: the unit of shown values; `scale` converts a record's value to it, `digits` is the number of decimals.
        higher_is_better: its direction.
        log: whether two values are compared by their ratio instead of their difference.
        low: the lowest possible value, as in records.
        high: the highest possible value.
        alias: a column of the user's table of candidates that also gives it, for every data set.
        pairing: `ROWS`, `WINDOWS`, `WEIGHTED`, `CORPUS`, or None if evaluations are not paired by it.
        samples: the name of the samples that hold its rows.
        values: the column of the samples that holds its value for a row, or its sum or its statistics.
        counts: the column that holds a row's count, of a metric that is paired as `WEIGHTED`.
        depth: if a row's value is a rank, the last rank that is right.
        right_or_wrong: whether a row's value is 0 or 1. Changes then have an exact McNemar test.
        mean_of: the section of the metrics whose unweighted mean it is, or None.
        reported: whether reports show its recovered share for every pair. They show the parts of a mean as details.
        answers: whether it can answer the study's questions, which the first such metric of a study does. Their
            sentences are about differences, so such a metric is not compared by ratios.
        setting: the section and key under `evaluate` in the configuration that list its data sets. A section may also
            have a key `metrics` that lists the metrics to measure by their sections in records.
        facts: the keys that a comparison copies from the dense model's evaluation.
        alike: the keys that must be equal in evaluations that are compared.
        names: the data sets that it is measured on; empty in `metrics.METRICS`.
    """

    key: str
    section: str
    label: str
    phrase: str = ""
    kind: str
    dataset: str = "data set"
    column: str = ""
    unit: str = ""
    scale: float = 1
    digits: int = 2
    higher_is_better: bool = True
    log: bool = False
    low: float = -math.inf
    high: float = math.inf
    alias: str | None = None
    pairing: str | None = ROWS
    samples: str = "{}"
    values: str = "correct"
    counts: str = ""
    depth: int | None = None
    right_or_wrong: bool = False
    mean_of: str | None = None
    reported: bool = True
    answers: bool = False
    setting: tuple[str, str] | None = None
    facts: tuple[str, ...] = ()
    alike: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def on(self, *names: str) -> "Metric":
        """Return this metric on a data set, or, if it is a mean, over several."""
        texts = {key: getattr(self, key).format(*names) for key in ("key", "label", "phrase", "samples") if names}
        return replace(self, names=names, **texts)

    @property
    def name(self) -> str | None:
        """The data set of a metric on one data set, else None."""
        return None if self.mean_of or not self.names else self.names[0]

    @property
    def spoken(self) -> str:
        """Its name inside sentences."""
        return self.phrase or self.label

    @property
    def heading(self) -> str:
        """What it measures, as a heading."""
        return self.kind[:1].upper() + self.kind[1:]

    @property
    def brief(self) -> str:
        """Its name on the axis of a figure."""
        return f"{self.kind} ({self.name})" if self.name else self.label

    @property
    def better(self) -> str:
        """Its direction, in words."""
        return "higher is better" if self.higher_is_better else "lower is better"

    def part(self, record: Record | None) -> Json:
        """Return what an evaluation or comparison record holds of it; None if nothing."""
        found = (record or {}).get(self.section)
        return (found or {}).get(self.name) if self.names and not self.mean_of else found

    def value(self, evaluation: Record | None) -> float | None:
        """Return its value in an evaluation record, or None."""
        found = self.part(evaluation)
        return found.get("value") if isinstance(found, dict) else found

    @property
    def mode(self) -> Literal["max", "min"]:
        """Its direction, as criteria spell it."""
        return "max" if self.higher_is_better else "min"

    @property
    def difference_unit(self) -> str:
        """The unit of differences between shown values."""
        return "points" if self.unit in POINTS else self.unit

    def with_unit(self, text: str) -> str:
        """Return `text` followed by the unit, if there is one."""
        return f"{text} ({self.unit})" if self.unit else text

    @property
    def sign(self) -> str:
        """What follows a shown value: " %" or nothing."""
        return " %" if self.unit == "%" else ""

    def shown(self, value: float, sign: str = "") -> str:
        """Return a value in its unit, with its number of decimals but without the unit's name."""
        return f"{self.scale * value:{sign}.{self.digits}f}"
