"""Checkpoints whose layers differ in width (`shapes`), and the models that fit them (`building`, which needs torch)."""

from .shapes import FAMILIES, MANIFEST, Shapes, Widths, layer_prefix, layers_of, tensor_shapes, write_manifest

__all__ = ["FAMILIES", "MANIFEST", "Shapes", "Widths", "layer_prefix", "layers_of", "tensor_shapes", "write_manifest"]
