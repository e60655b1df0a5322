"""Safetensors files filled by whole tensors, in whatever order these come."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from bridge.manifest import Files
from bridge.storage.new_files import Flusher, NewFile
from bridge.storage.source import FileLayout, Payload


class StreamedFiles:
    """Files filled by whole tensors in whatever order these come.

    The stream is collective, so a file that cannot be written does not stop it: the first failure
    is kept, what follows is dropped, and leaving the block raises it.
    """

    def __init__(self, layouts: Sequence[FileLayout], directory: Path) -> None:
        self._layouts, self._directory = layouts, directory
        self._places: dict[str, tuple[NewFile, Payload]] = {}
        self._sha256: dict[str, str] = {}
        self._failure: Exception | None = None
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
        except Exception as error:  # noqa: BLE001 - the others would wait for ever
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
            self._sha256[name] = hashlib.sha256(data).hexdigest()
            self._flusher.start(file)
        except Exception as error:  # noqa: BLE001 - the others would wait for ever
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

    def differences(self, found: Files) -> list[str]:
        """The tensors that are not what was written, by the hashes of the files read back."""
        parts = (part for entry in found.values() for part in entry.parts)
        return [part.tensor for part in parts if self._sha256.get(part.tensor) != part.sha256]
