"""Models: loading and saving them, running many texts at once, and measuring or estimating what they need.

This package exports the names of `loading` and `tokenizing`, which load models and their tokenizers, of `readers`,
which has a model's tokenizer and image processor in one object, of `sizes`, which counts parameters, and `load_adapter`
of `adapters`, which puts an adapter on a model. `kinds` has what the stages must know about a kind of model;
`causal_lm`, `seq2seq`, `image_text` and `dual_encoder` are such kinds, with engines and towers in modules of their own.
`packing`, `tree_scoring`, `prefix_tree` and `output_head` run many texts at once through a causal language model.
`pruned_shapes` serves checkpoints whose layers differ in width. `files` checks a checkpoint's files (`pickles` those
that may run code), and `intake` whether the model can do what a study asks of it. `dimensions` reads the sizes in a
configuration, `footprint` and `cost` measure a model, and `estimates` predicts what a job will need.
"""

from .adapters import load_adapter
from .loading import (
    Source,
    broken,
    context_length,
    device,
    device_kind,
    device_memory,
    dtype_of,
    folder_of,
    kind_of,
    known_context_length,
    load,
    save,
    skeleton,
)
from .readers import Reader
from .sizes import count_parameters, parameters
from .tokenizing import check_vocabulary, load_tokenizer

__all__ = [
    "Reader",
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
    "kind_of",
    "known_context_length",
    "load",
    "load_adapter",
    "load_tokenizer",
    "parameters",
    "save",
    "skeleton",
]
