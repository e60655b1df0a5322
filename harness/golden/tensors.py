"""Tensors in words that change with any of their bits, and a reader that is not the bridge's."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from harness.compare import words_of

_STACKED: Final = re.compile(r"decoder\.layers\.(\D.*)")


def describe_tensors(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Dtype, shape and sha256 of each tensor, by name in alphabetical order."""
    return {name: describe_tensor(tensors[name]) for name in sorted(tensors)}


def describe_tensor(tensor: Any) -> str:  # noqa: ANN401 - a torch tensor; torch is not imported here
    """`float32 (24, 20) 2b5f...`: the hash is over the little-endian words, row by row."""
    words = words_of(tensor)
    digest = hashlib.sha256(words.astype(words.dtype.newbyteorder("<"), copy=False).tobytes())
    shape = ", ".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')} ({shape}) {digest.hexdigest()}"


def read_torch_dist(root: Path) -> dict[str, Any]:
    """The tensors of a Megatron checkpoint by torch's own reader, layers unstacked.

    The bridge's reader could undo a mistake of its writer.

    Args:
        root: Holds one iteration.
    """
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(next(root.glob("iter_*")))
    stored = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(info.size, dtype=info.properties.dtype)
        for name, info in stored.items()
        if isinstance(info, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group: none is wanted
        load(state, storage_reader=reader, no_dist=True)
    found: dict[str, Any] = {}
    for name, tensor in state.items():
        match = _STACKED.fullmatch(name)
        if match is None:
            found[name] = tensor
            continue
        for layer_idx, layer in enumerate(tensor):
            found[f"decoder.layers.{layer_idx}.{match[1]}"] = layer
    return found
