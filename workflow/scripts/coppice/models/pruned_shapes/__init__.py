"""Checkpoints whose layers have different widths (`shapes`), and the models that fit them (`building`, needs torch)."""

from .shapes import FAMILIES, MANIFEST, layers_of, tensor_shapes, write_manifest

__all__ = ["FAMILIES", "MANIFEST", "layers_of", "tensor_shapes", "write_manifest"]
