"""Sequences that begin alike, run through a causal language model as one prefix tree: each shared token once.

`trie`: sequences as a tree, and the tree cut into rows and batches; `forward`: such a batch through a model, with the
attention mask and the positions that make each branch see its own ancestors alone. Zero-shot scoring and LoRA training
both stand on it.
"""

from .forward import TreeForward, TreeMasks
from .trie import Row, Trie, batches, build, rows

__all__ = ["Row", "TreeForward", "TreeMasks", "Trie", "batches", "build", "rows"]
