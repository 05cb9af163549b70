"""Models: where they lie, how they are loaded and saved, what they take.

`causal_lm` loads causal language models, and its names are this package's own; `pruned_shapes` those whose layers
differ in width; `prefix_tree` and `output_head` run many texts at once; `files`, `footprint`, `cost` and `estimates`
say what a checkpoint holds and what a model needs.
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
