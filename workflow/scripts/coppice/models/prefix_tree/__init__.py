"""Run sequences that begin alike through a causal language model as one prefix tree, each shared token once.

`trie` turns sequences into a tree, and the tree into rows and batches. `forward` runs such a batch through a model,
with the attention mask and the positions that let each branch see only its own ancestors. Both zero-shot scoring and
LoRA training use this package.
"""

from .forward import TreeForward, TreeMasks
from .trie import Row, Trie, batches, build, rows

__all__ = ["Row", "TreeForward", "TreeMasks", "Trie", "batches", "build", "rows"]
