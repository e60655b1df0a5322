"""Fill live tensors from a `TensorSource`: each byte read once, while others are on their way.

Threads take pieces of a few MiB in the order they lie in the files. On a CPU and in the file's own
dtype a piece is read straight into the parameter. Otherwise it is read into one of a few buffers
and copied on from there: by the CPU, which casts it, or by the GPU's copy engine, which works while
the next buffers are filled and leaves the cast to the GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Lock
from typing import Final, NamedTuple

import torch

from bridge.dtypes import Dtype, dtype_named
from bridge.errors import AccountingError, DtypeMismatchError
from bridge.parameters import EMBEDDING_ROW, OUTPUT_ROW, Parameter
from bridge.progress import Advance
from bridge.spec import ModelSpec
from bridge.staging import Ring, as_words, rings_for
from bridge.storage.source import TensorSource
from bridge.tiling import Box, Shape, Tile, Tiling, bands
from bridge.transfer import TransferLimits

DEFAULT_LIMITS: Final = TransferLimits()
PADDED: Final = frozenset({EMBEDDING_ROW.name, OUTPUT_ROW.name})
"""Parameters whose rows Megatron pads, by an amount that depends on TP."""
_FLOATS: Final = frozenset({"float64", "float32", "float16", "bfloat16"})
_PIECE: Final = 4 << 20
"""Bytes read at once: long enough for a disk, short enough to be in the cache for the cast."""


def unwatched(nbytes: int) -> None:
    """Nobody asked for the progress."""


def fill(
    wanted: Sequence[tuple[str, torch.Tensor, Tiling]],
    source: TensorSource,
    shapes: Mapping[str, Shape],
    *,
    limits: TransferLimits = DEFAULT_LIMITS,
    advance: Advance = unwatched,
) -> None:
    """Fill tensors in place. On a GPU all of it is done when this returns.

    Args:
        wanted: Name for errors, the tensor, and the tiling of exactly that tensor by tensors of
            the source. A `Tiling` covers its target once, so every element is written once.
        source: Where the bytes are. Zero tiles are zeroed.
        shapes: What the source's tensors must be, at least those that are read.
        limits: Threads that read, and memory for what is between the files and the tensors
            (page-locked for a GPU).
        advance: Progress in bytes of the source.

    Raises:
        AccountingError: BR301, tensors missing from the source or of another shape; all of them in
            one error, before anything is read.
        DtypeMismatchError: BR303, tensors that are not floating-point numbers.
        CorruptFileError: BR302, a file ends early. Some tensors are filled by then.
    """
    _check(wanted, source, shapes)
    tiles: list[_Piece] = []
    for _, tensor, tiling in wanted:
        for tile in tiling.tiles:
            target = tensor.detach()[tile.target_box.slices]
            if tile.source is None:
                _zero(target)
            else:
                dtype = source.tensors[tile.source].dtype
                tiles.append(_Piece(tile.source, tile.source_box, dtype, target))
    # Files are read forwards: a source lists its tensors as they lie there.
    order = {name: position for position, name in enumerate(source.tensors)}
    tiles.sort(key=lambda tile: (order[tile.source], tile.box.starts))
    nbytes = min(_PIECE, limits.band_nbytes)
    pieces = _Pieces(_cut(tiles, nbytes))
    inference = torch.is_inference_mode_enabled()  # each thread has its own
    with (
        rings_for({tile.target.device for tile in tiles}, limits.threads, nbytes) as rings,
        ThreadPoolExecutor(limits.threads, thread_name_prefix="fill") as pool,
    ):
        try:
            workers = [
                pool.submit(_work, pieces, source, rings, advance, inference=inference)
                for _ in range(limits.threads)
            ]
            for worker in as_completed(workers):
                worker.result()
        finally:
            pieces.stop()


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


def _zero(target: torch.Tensor) -> None:
    target.zero_()


class _Piece(NamedTuple):
    """A box of a source's tensor and the part of a parameter that it is for."""

    source: str
    box: Box
    dtype: Dtype
    target: torch.Tensor


def _cut(pieces: Iterable[_Piece], nbytes: int) -> Iterator[_Piece]:
    for source, whole, dtype, target in pieces:
        for box in bands(whole, max_elements=nbytes // dtype.itemsize):
            yield _Piece(source, box, dtype, target[box.relative_to(whole).slices])


class _Pieces:
    """Pieces that several threads take from, each piece once."""

    def __init__(self, pieces: Iterator[_Piece]) -> None:
        self._pieces = pieces
        self._lock = Lock()

    def __iter__(self) -> Iterator[_Piece]:
        return self

    def __next__(self) -> _Piece:
        with self._lock:
            return next(self._pieces)

    def stop(self) -> None:
        """Have no pieces left."""
        with self._lock:
            self._pieces = iter(())


def _work(
    pieces: _Pieces,
    source: TensorSource,
    rings: Mapping[torch.device, Ring],
    advance: Advance,
    *,
    inference: bool,
) -> None:
    with torch.inference_mode(inference):
        for name, box, dtype, target in pieces:
            if target.device.type == "cpu" and dtype == dtype_named(str(target.dtype)):
                source.read_into(name, box, as_words(target, dtype))
            else:
                rings[target.device].move(source, name, box, target)
            advance(box.volume * dtype.itemsize)
