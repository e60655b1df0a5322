"""When two checkpoints are one model and two files one input: sha256 of what they mean.

The digests do not depend on how a checkpoint is stored. A Megatron checkpoint is hashed in Hugging
Face's terms, tensor by tensor through the plan, so both sides of a right conversion have equal
digests, however either is sharded or padded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np

from bridge.dtypes import Dtype
from bridge.plan import Plan
from bridge.progress import Advance
from bridge.spec import ModelSpec
from bridge.storage.source import TensorSource
from bridge.tiling import Box, Tile, Tiling
from bridge.transfer import TransferLimits, read_bands

Array = np.ndarray[Any, np.dtype[Any]]

_NOT_THE_MODEL: Final = frozenset({"params_dtype", "max_position_embeddings"})
"""Training may change these without changing what the weights mean; weights have their dtype."""


def config_sha256(config: Mapping[str, Any]) -> str:
    """Of a parsed `config.json`, whatever the order and spacing in the file."""
    return _digest(config)


def spec_sha256(spec: ModelSpec) -> str:
    """Of the model that the bridge understands: every block, by kind and width."""
    fields = _plain(spec)
    return _digest({name: fields[name] for name in fields.keys() - _NOT_THE_MODEL})


def inputs_sha256(input_ids: Array, position_ids: Array) -> str:
    """Of token ids and positions; positions given once stand for every sequence."""
    found = hashlib.sha256()
    for values in (input_ids, np.broadcast_to(position_ids, input_ids.shape)):
        found.update(f"{values.shape}".encode())
        found.update(np.ascontiguousarray(values, dtype="<i8").tobytes())
    return found.hexdigest()


def hf_weights_sha256(
    source: TensorSource,
    *,
    limits: TransferLimits | None = None,
    advance: Advance = lambda _nbytes: None,
) -> str:
    """Of every tensor's name, dtype, shape and bytes, in the order of the names."""
    tilings = {name: _itself(name, info.shape) for name, info in source.tensors.items()}
    dtypes = {name: info.dtype for name, info in source.tensors.items()}
    return _weights(source, tilings, dtypes, limits, advance)


def megatron_weights_sha256(
    source: TensorSource,
    spec: ModelSpec,
    *,
    limits: TransferLimits | None = None,
    advance: Advance = lambda _nbytes: None,
) -> str:
    """The same of a Megatron checkpoint: of the Hugging Face tensors that it holds.

    Raises:
        DtypeMismatchError: BR303, the parts of one tensor are stored in several dtypes.
    """
    plan = Plan.of_checkpoint(spec, source.tensors)
    tilings = plan.mcore_to_hf
    dtypes = plan.target_dtypes(tilings, source.tensors, where="the Megatron checkpoint")
    return _weights(source, tilings, dtypes, limits, advance)


def _itself(name: str, shape: tuple[int, ...]) -> Tiling:
    whole = Box.whole(shape)
    return Tiling(shape, (Tile(name, whole, whole),))


def _weights(
    source: TensorSource,
    tilings: Mapping[str, Tiling],
    dtypes: Mapping[str, Dtype],
    limits: TransferLimits | None,
    advance: Advance,
) -> str:
    limits = limits or TransferLimits()

    def one(name: str) -> list[object]:
        tiling, word = tilings[name], dtypes[name].word
        whole = Box.whole(tiling.shape)
        found = hashlib.sha256()
        for words in read_bands(source, tiling, whole, word=word, band_nbytes=limits.band_nbytes):
            found.update(words.reshape(-1).view("u1").data)
            advance(words.nbytes)
        return [name, dtypes[name].name, list(tiling.shape), found.hexdigest()]

    with ThreadPoolExecutor(limits.threads) as pool:
        return _digest(list(pool.map(one, sorted(tilings))))


def _plain(value: object) -> Any:  # noqa: ANN401 - JSON out
    """A spec as plain data; a class without fields (`NoOp`) is told from another by its name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {one.name: _plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


def _digest(data: object) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
