"""Select a model's best candidate by a named criterion, on data that the reports never use.

`ranking` compares candidates by a criterion; `choice` makes and records the choice of one config; `margins` tells
whether its lead is noise; `linking` shows the results of the chosen candidate in the config's folder; `scoring` says
which candidates need an evaluation; `summary` writes `candidates.tsv`, `SUMMARY.md` and the figures.
"""

from .choice import chosen, select_best, weights_of
from .linking import forget_stale, link
from .ranking import needed_metrics, needs_scoring
from .summary import summarize

__all__ = [
    "chosen",
    "forget_stale",
    "link",
    "needed_metrics",
    "needs_scoring",
    "select_best",
    "summarize",
    "weights_of",
]
