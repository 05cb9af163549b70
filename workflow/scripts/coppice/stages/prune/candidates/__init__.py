"""Candidates: prune them or import the user's own, and delete or restore their weights.

A candidate's folder holds an ordinary Hugging Face checkpoint and its `pruning.json`. A user's own checkpoint is
linked, never copied or written to. `making` writes candidates, with text that `calibration` draws; `weights_on_disk`
deletes the weights of candidates that no config chose and restores them if a job needs them again.
"""

from .making import PruningRequest, import_checkpoint, link, prune
from .weights_on_disk import checkpoint, ensure, record_of, release

__all__ = ["PruningRequest", "checkpoint", "ensure", "import_checkpoint", "link", "prune", "record_of", "release"]
