"""Checkpoints whose layers differ in width (`shapes`), and the models that fit them (`building`, which needs torch)."""

from .shapes import FAMILIES, MANIFEST, Shapes, Widths, layer_prefix, layers_of, tensor_shapes, write_manifest
from .stacks import STACKS

__all__ = [
    "FAMILIES",
    "MANIFEST",
    "STACKS",
    "Shapes",
    "Widths",
    "layer_prefix",
    "layers_of",
    "tensor_shapes",
    "write_manifest",
]
