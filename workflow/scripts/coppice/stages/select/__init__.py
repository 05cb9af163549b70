"""Select a model's best candidate by a named criterion, on data that the reports never use.

`ranking` compares candidates by a criterion; `choice` makes and records the choice of one config; `margins` tells
whether its lead is noise; `scoring` says which candidates need an evaluation; `summary` writes `candidates.tsv`,
`SUMMARY.md` and the figures.
"""

from .choice import chosen, config_to_train, select_best, trained
from .ranking import needed_metrics, needs_scoring
from .summary import summarize

__all__ = ["chosen", "config_to_train", "needed_metrics", "needs_scoring", "select_best", "summarize", "trained"]
