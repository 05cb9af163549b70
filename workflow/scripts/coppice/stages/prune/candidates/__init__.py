"""Candidates: made here by pruning or taken in from the user, and what becomes of their weights.

A candidate's folder holds an ordinary Hugging Face checkpoint (a user's own is linked, never copied or written to) and
its `pruning.json`. `making` writes them; `keeping` lets the weights of those that were not chosen go, and makes them
anew where they are asked for again.
"""

from .keeping import checkpoint, ensure, release
from .making import link, prune, take_in

__all__ = ["checkpoint", "ensure", "link", "prune", "release", "take_in"]
