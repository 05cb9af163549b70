"""Find groups of equal and nearly equal texts, of which a data set keeps one.

Texts are equal if they differ only in spaces at the ends of lines. They are nearly equal if MinHash estimates that
their sets of five successive words have a Jaccard similarity of at least `THRESHOLD`, as for StarCoder (Li et al.
2023). A chain of such pairs is one group.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

from coppice.core import logs

THRESHOLD, PERMUTATIONS = 0.7, 128
GRAM = 5  # words of a shingle
WORD = re.compile(r"\w+")


def first_of_each(texts: Sequence[str]) -> tuple[dict[int, int], dict[int, int]]:
    """Return (exact, near): for each text that repeats an earlier one its index -> that of the text that is kept."""
    exact, near, kept = {}, {}, {}
    for index, text in enumerate(texts):
        digest = hashlib.sha256("\n".join(line.rstrip() for line in text.strip().splitlines()).encode()).digest()
        first = kept.setdefault(digest, index)
        if first != index:
            exact[index] = first
    for index, first in _groups({index: texts[index] for index in kept.values()}).items():
        if first != index:
            near[index] = first
    return exact, near


def _groups(texts: Mapping[int, str]) -> dict[int, int]:
    """Return the index of each text -> the lowest index of its group."""
    from datasketch import MinHash, MinHashLSH
    from scipy.cluster.hierarchy import DisjointSet

    groups = DisjointSet(texts)
    neighbors, hashes = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS), {}
    empty = MinHash(num_perm=PERMUTATIONS)
    for index, text in logs.progress(texts.items(), "near duplicates", len(texts), "files"):
        hashes[index] = own = empty.copy()
        own.update_batch([gram.encode() for gram in shingles(text)])
        for other in neighbors.query(own):
            if own.jaccard(hashes[other]) >= THRESHOLD:  # the index also finds texts that are a little less alike
                groups.merge(index, other)
        neighbors.insert(index, own)
    return {index: min(group) for group in groups.subsets() for index in group}


def shingles(text: str) -> set[str]:
    """Return the sets of successive words of a text; of a text of fewer words, that text."""
    words = WORD.findall(text)
    return {" ".join(words[start : start + GRAM]) for start in range(max(1, len(words) - GRAM + 1))}
