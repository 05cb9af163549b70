"""Selection: the best candidate of a model by a named criterion, on data that the reports never use.

`criteria`: metrics, bounds and orders; `choice`: the choice of one config, with its margin; `summary`: the table of all
candidates with what was chosen, and a figure a model.
"""

from .choice import chosen, config_to_train, select_best, trained
from .ranking import asked, needs_scoring
from .summary import summarize

__all__ = ["asked", "chosen", "config_to_train", "needs_scoring", "select_best", "summarize", "trained"]
