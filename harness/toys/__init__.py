"""Toy models: small, heterogeneous, and sure to show a mistake."""

from harness.toys.catalogue import CONTEXT_TOY, TOYS, VARIANT_TOYS, toy_named
from harness.toys.checkpoint import side_files, write_checkpoint
from harness.toys.model import Toy, hf_tensors

__all__ = [
    "CONTEXT_TOY",
    "TOYS",
    "VARIANT_TOYS",
    "Toy",
    "hf_tensors",
    "side_files",
    "toy_named",
    "write_checkpoint",
]
