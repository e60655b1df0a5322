"""Between a read and a device: a few buffers in turn, and copies that go on meanwhile.

All that is CUDA's own is in `_Cuda`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Protocol

import torch

from bridge.dtypes import Dtype, Words
from bridge.storage.source import TensorSource
from bridge.tiling import Box

_Wait = Callable[[], object]


class _Device(Protocol):
    """How bytes get from a buffer into parameters on one device."""

    buffers_per_thread: int

    def buffer(self, nbytes: int) -> torch.Tensor:
        """Bytes on the CPU."""
        ...

    def send(self, floats: torch.Tensor, target: torch.Tensor) -> _Wait:
        """Begin to copy; what is returned waits until it is done."""
        ...

    def finish(self) -> None:
        """Wait until all copies are done."""
        ...


class _Cpu:
    """Copies that are done at once."""

    buffers_per_thread = 1

    def buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def send(self, floats: torch.Tensor, target: torch.Tensor) -> _Wait:
        target.copy_(floats)
        return self.finish

    def finish(self) -> None:
        """Nothing is under way."""


class _Cuda:
    """Copies from page-locked memory on a stream of their own."""

    buffers_per_thread = 2  # one is filled while the other is copied

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        # Whoever made the parameters may still be writing to them.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def buffer(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def send(self, floats: torch.Tensor, target: torch.Tensor) -> _Wait:
        with torch.cuda.stream(self._stream):
            if floats.dtype != target.dtype:  # torch would cast on the CPU
                floats = floats.to(target.device, non_blocking=True)
            target.copy_(floats, non_blocking=True)
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            done.record()
        return done.synchronize

    def finish(self) -> None:
        self._stream.synchronize()


class Ring:
    """Buffers in turn: one is written to again only when it has been copied from.

    Args:
        device: Where the copies go.
        count: Of buffers, at least one for each thread that moves pieces.
        nbytes: Of a buffer.
    """

    def __init__(self, device: _Device, count: int, nbytes: int) -> None:
        self._device = device
        self._free: SimpleQueue[tuple[torch.Tensor, _Wait | None]] = SimpleQueue()
        for _ in range(count):
            self._free.put((device.buffer(nbytes), None))

    def move(self, source: TensorSource, name: str, box: Box, target: torch.Tensor) -> None:
        """Read a box of a source's tensor and begin its copy to the target, of the same shape."""
        dtype = source.tensors[name].dtype
        buffer, wait = self._free.get()
        try:
            if wait is not None:
                wait()
            floats = buffer[: box.volume * dtype.itemsize]
            floats = floats.view(getattr(torch, dtype.name)).view(box.shape)
            source.read_into(name, box, as_words(floats, dtype))
            wait = self._device.send(floats, target)
        finally:
            self._free.put((buffer, wait))


@contextmanager
def rings_for(
    devices: Iterable[torch.device], threads: int, nbytes: int
) -> Iterator[dict[torch.device, Ring]]:
    """A ring for each device; every copy is done at the end, after an error too."""
    found: dict[torch.device, _Device] = {
        device: _Cuda(device) if device.type == "cuda" else _Cpu() for device in devices
    }
    try:
        yield {
            device: Ring(copies, copies.buffers_per_thread * threads, nbytes)
            for device, copies in found.items()
        }
    finally:
        for copies in found.values():
            copies.finish()


def as_words(tensor: torch.Tensor, dtype: Dtype) -> Words:
    """The bits of a CPU tensor of this dtype as words, sharing memory."""
    # torch knows few operations on unsigned words, and needs none: the bits are only renamed.
    signed: Words = tensor.view(getattr(torch, f"int{8 * dtype.itemsize}")).numpy()
    return signed.view(dtype.word)
