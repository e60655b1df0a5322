"""Fill live tensors from a `TensorSource`, tile by tile, in place.

On a CPU and in the file's own dtype the source writes straight into the parameter; otherwise a
band of rows at a time goes through a buffer, so a 14 GB tensor costs no second 14 GB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import torch

from bridge.dtypes import Dtype, Words, dtype_named
from bridge.errors import AccountingError, DtypeMismatchError
from bridge.parameters import EMBEDDING_ROW, OUTPUT_ROW, Parameter
from bridge.spec import ModelSpec
from bridge.storage.source import TensorSource
from bridge.tiling import Box, Shape, Tile, Tiling, bands

_FLOATS: Final = frozenset({"float64", "float32", "float16", "bfloat16"})
PADDED: Final = frozenset({EMBEDDING_ROW.name, OUTPUT_ROW.name})
"""Parameters whose rows Megatron pads, by an amount that depends on TP."""
_BAND: Final = 1 << 24
"""Elements that go through the buffer at once: 64 MiB of float32."""


def fill(
    wanted: Sequence[tuple[str, torch.Tensor, Tiling]],
    source: TensorSource,
    shapes: Mapping[str, Shape],
) -> None:
    """Fill tensors in place.

    Args:
        wanted: Name for errors, the tensor, and the tiling of exactly that tensor by tensors of
            the source. A `Tiling` covers its target once, so every element is written once.
        source: Where the bytes are. Zero tiles are zeroed.
        shapes: What the source's tensors must be, at least those that are read.

    Raises:
        AccountingError: BR301, tensors missing from the source or of another shape; all of them in
            one error, before anything is read.
        DtypeMismatchError: BR303, tensors that are not floating-point numbers.
    """
    _check(wanted, source, shapes)
    with torch.no_grad():
        for _, tensor, tiling in wanted:
            for tile in tiling.tiles:
                _fill_tile(tensor.detach(), tile, source)


def tiling_from_megatron(
    parameter: Parameter, spec: ModelSpec, source: TensorSource
) -> tuple[Tiling, Shape]:
    """Tile a whole Megatron parameter by the tensor of the same name in a checkpoint.

    Returns:
        The tiling and the shape the stored tensor must have. One tile, unless the vocabulary was
        padded to another size there: then the vocabulary's own rows and a zero tile.
    """
    whole = Box.whole(parameter.shape)
    stored = source.tensors.get(parameter.name)
    rows, *rest = parameter.shape
    vocab = spec.vocab_size
    if (
        parameter.name in PADDED
        and stored is not None
        and stored.shape != parameter.shape
        and stored.shape[1:] == tuple(rest)
        and stored.shape[0] >= vocab
    ):
        used, zeros = Box.rows(0, vocab, tuple(rest)), Box.rows(0, rows - vocab, tuple(rest))
        padding = zeros.shift((vocab, *(0 for _ in rest)))
        tiles = (Tile(parameter.name, used, used), Tile(None, zeros, padding))
        return Tiling(parameter.shape, tiles[: 1 + (rows > vocab)]), stored.shape
    return Tiling(parameter.shape, (Tile(parameter.name, whole, whole),)), parameter.shape


def _check(
    wanted: Sequence[tuple[str, torch.Tensor, Tiling]],
    source: TensorSource,
    shapes: Mapping[str, Shape],
) -> None:
    held = source.tensors
    problems, dtypes = [], []
    for name in sorted({tile.source for _, _, one in wanted for tile in one.tiles if tile.source}):
        info = held.get(name)
        if info is None:
            problems.append(f"{name}: missing")
            continue
        if info.shape != shapes[name]:
            problems.append(f"{name}: shape {info.shape}, the model's is {shapes[name]}")
        if info.dtype.name not in _FLOATS:
            dtypes.append(f"{name}: {info.dtype.name}")
    if problems:
        raise AccountingError(
            f"{len(problems)} tensors are not as the model needs them",
            where=problems,
            hint="the checkpoint and its configuration describe different models",
        )
    if dtypes:
        raise DtypeMismatchError(
            "only floating-point weights can be loaded into a live model",
            where=dtypes,
            hint="dequantize the checkpoint first",
        )


def _fill_tile(tensor: torch.Tensor, tile: Tile, source: TensorSource) -> None:
    target = tensor[tile.target_box.slices]
    if tile.source is None:
        target.zero_()
        return
    dtype = source.tensors[tile.source].dtype
    if tensor.device.type == "cpu" and dtype == dtype_named(str(tensor.dtype)):
        source.read_into(tile.source, tile.source_box, _as_words(target, dtype))
        return
    for band in bands(tile.source_box, max_elements=_BAND):
        buffer: Words = np.empty(band.shape, dtype.word)
        source.read_into(tile.source, band, buffer)
        target[band.relative_to(tile.source_box).slices].copy_(_as_floats(buffer, dtype))


def _as_words(tensor: torch.Tensor, dtype: Dtype) -> Words:
    signed: Words = tensor.view(getattr(torch, f"int{8 * dtype.itemsize}")).numpy()
    return signed.view(dtype.word)


def _as_floats(words: Words, dtype: Dtype) -> torch.Tensor:
    # torch knows few operations on unsigned words, and needs none: the bits are only renamed.
    signed = torch.from_numpy(words.view(f"<i{dtype.itemsize}"))
    return signed.view(getattr(torch, dtype.name))
