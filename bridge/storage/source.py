"""The seam between formats and everything that moves tensors: sources to read, files to write.

A `TensorSource` gives any box of any tensor as words (`bridge.dtypes`), never as numbers. A format
that writes describes its files as `FileLayout`s: literal bytes here, a box of that tensor there.
`bridge.convert` fills them; neither side knows the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from bridge.dtypes import Dtype, Words
from bridge.tiling import Box, Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: Shape
    dtype: Dtype

    @property
    def nbytes(self) -> int:
        """Size of the elements in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """Named tensors that can be read piece by piece, from several threads at once."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Everything the source holds."""
        ...

    def read_into(self, name: str, box: Box, out: Words) -> None:
        """Fill `out`, of shape `box.shape` and the dtype's word, with that box of the tensor.

        `out` may be any writable view, strided ones included.

        Raises:
            CorruptFileError: BR302, the file is shorter than it says.
        """
        ...

    def close(self) -> None:
        """Release files. A closed source is not read again."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """One box of one target tensor, stored row-major at `offset` of a file.

    `crc32_at` names the places of the file that want the payload's CRC-32 as four little-endian
    bytes (a zip record has two). They are written once the payload is.
    """

    tensor: str
    box: Box
    offset: int
    nbytes: int
    crc32_at: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLayout:
    """A file, byte by byte: every byte is in one literal or one payload."""

    path: str
    """Relative to the checkpoint directory, with forward slashes."""
    size: int
    literals: tuple[tuple[int, bytes], ...]
    payloads: tuple[Payload, ...]

    @property
    def payload_nbytes(self) -> int:
        """Bytes that are tensors'."""
        return sum(payload.nbytes for payload in self.payloads)
