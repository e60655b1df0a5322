"""Safetensors files filled by whole tensors, in whatever order these come."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
import torch

from bridge.checksums import crc32
from bridge.errors import CheckpointError
from bridge.storage.new_files import Flusher, NewFile
from bridge.storage.safetensors import SafetensorsSource
from bridge.storage.source import FileLayout, Payload
from bridge.tiling import Box, bands

_BAND: Final = 16 << 20
"""Bytes read back at once."""


class StreamedFiles:
    """Files filled by whole tensors in whatever order these come.

    The stream is collective, so a file that cannot be written does not stop it: the first failure
    is kept, what follows is dropped, and leaving the block raises it.
    """

    def __init__(self, layouts: Sequence[FileLayout], directory: Path) -> None:
        self._layouts, self._directory = layouts, directory
        self._places: dict[str, tuple[NewFile, Payload]] = {}
        self._crc32: dict[str, int] = {}
        self._failure: CheckpointError | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        flusher = self._stack.enter_context(Flusher())
        self._flusher = flusher
        try:
            for layout in self._layouts:
                file = flusher.create(self._directory, layout.path, layout.size)
                for offset, literal in layout.literals:
                    file.write(literal, offset)
                self._places |= {payload.tensor: (file, payload) for payload in layout.payloads}
        except CheckpointError as error:
            self._failure = error
        return self

    def write(self, name: str, weight: torch.Tensor) -> None:
        """Write one tensor, unless something has failed."""
        if self._failure is not None:
            return
        try:
            file, payload = self._places[name]
            data = weight.contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.write(data, payload.offset)
            self._crc32[name] = crc32(data)
            self._flusher.start(file)
        except CheckpointError as error:
            self._failure = error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self._failure is not None:
            self._stack.__exit__(type(self._failure), self._failure, None)
            raise self._failure
        if kind is None:
            for file in dict.fromkeys(file for file, _ in self._places.values()):
                self._flusher.finish(file)
        self._stack.__exit__(kind, error, trace)

    def differences(self, directory: Path) -> list[str]:
        """Read everything back; the tensors that are not what was written."""
        names = [layout.path for layout in self._layouts]
        wrong = []
        with SafetensorsSource(directory, files=names) as source:
            for name, expected in self._crc32.items():
                info = source.tensors[name]
                found = 0
                for box in bands(Box.whole(info.shape), max_elements=_BAND // info.dtype.itemsize):
                    words = np.empty(box.shape, info.dtype.word)
                    source.read_into(name, box, words)
                    found = crc32(words.reshape(-1).view("u1").data, found)
                if found != expected:
                    wrong.append(name)
        return wrong
