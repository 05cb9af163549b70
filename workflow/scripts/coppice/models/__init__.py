"""Models: loading and saving them, running many texts at once, and measuring or estimating what they need.

This package exports the names of `causal_lm`, which loads and saves causal language models. `pruned_shapes` serves
checkpoints whose layers differ in width. `prefix_tree` and `output_head` run many texts at once. `files` checks a
checkpoint's files, `footprint` and `cost` measure a model, and `estimates` predicts what a job will need.
"""

from .causal_lm import (
    Source,
    broken,
    check_vocabulary,
    context_length,
    count_parameters,
    device,
    device_kind,
    device_memory,
    dtype_of,
    folder_of,
    load,
    load_adapter,
    load_tokenizer,
    parameters,
    save,
    skeleton,
)

__all__ = [
    "Source",
    "broken",
    "check_vocabulary",
    "context_length",
    "count_parameters",
    "device",
    "device_kind",
    "device_memory",
    "dtype_of",
    "folder_of",
    "load",
    "load_adapter",
    "load_tokenizer",
    "parameters",
    "save",
    "skeleton",
]
