"""Buffers are written to only when they have been copied from, on devices that copy later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import bridge.loading
from bridge import staging
from bridge.loading import fill
from bridge.tiling import Box, Tile, Tiling
from bridge.transfer import TransferLimits

ArraySourceMaker = Callable[..., Any]


class LateDevice:
    """Copies only when somebody waits for the copy, as late as a GPU ever could.

    Attributes:
        events: "read" is put in by the tests' sources.
    """

    buffers_per_thread = 2

    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.buffers: list[torch.Tensor] = []
        self.under_way: list[Callable[[], None]] = []

    def buffer(self, nbytes: int) -> torch.Tensor:
        """Remember it."""
        self.buffers.append(torch.empty(nbytes, dtype=torch.uint8))
        return self.buffers[-1]

    def send(self, floats: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
        """Promise to copy."""
        self.events.append("send")

        def copy() -> None:
            if copy in self.under_way:
                self.under_way.remove(copy)
                self.events.append("copy")
                target.copy_(floats)

        self.under_way.append(copy)
        return copy

    def finish(self) -> None:
        """Copy what nobody waited for."""
        self.events.append("finish")
        for copy in list(self.under_way):
            copy()


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateDevice:
    """The CPU as such a device, and pieces of two rows."""
    device = LateDevice([])
    monkeypatch.setattr(staging, "_Cpu", lambda: device)
    monkeypatch.setattr(bridge.loading, "_PIECE", 32)
    return device


class Noting:
    """A source that puts its reads among a device's events."""

    def __init__(self, source: Any, events: list[str], fail_at: int = -1) -> None:  # noqa: ANN401 - the conftest's
        self.source, self.events, self.fail_at = source, events, fail_at
        self.tensors = source.tensors

    def read_into(self, name: str, box: Box, out: Any) -> None:  # noqa: ANN401 - words
        """Note it, then read or fail."""
        self.events.append("read")
        if self.events.count("read") == self.fail_at:
            raise OSError("the disk is gone")
        self.source.read_into(name, box, out)

    def close(self) -> None:
        """Nothing is open."""


def load(
    array_source: ArraySourceMaker, late: LateDevice, threads: int, **how: int
) -> torch.Tensor:
    """Fill ten rows of float64 from float32, five pieces of two rows each."""
    values = np.arange(40, dtype=np.float32).reshape(10, 4)
    whole = Box.whole(values.shape)
    target = torch.full(whole.shape, torch.nan, dtype=torch.float64)
    fill(
        [("t", target, Tiling(whole.shape, (Tile("a", whole, whole),)))],
        Noting(array_source({"a": values}), late.events, **how),
        {"a": whole.shape},
        limits=TransferLimits(threads=threads),
    )
    return target


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_no_buffer_is_reused_before_its_copy(
    array_source: ArraySourceMaker, late: LateDevice, threads: int
) -> None:
    """Copies that come as late as possible still find what was read for them."""
    target = load(array_source, late, threads)
    assert torch.equal(torch.arange(40, dtype=torch.float64).view(10, 4), target)
    assert [32] * 2 * threads == [len(buffer) for buffer in late.buffers]


def test_reading_goes_on_while_a_copy_is_under_way(
    array_source: ArraySourceMaker, late: LateDevice
) -> None:
    """One thread reads the second piece before the first is copied, and waits only for its turn."""
    load(array_source, late, 1)
    assert late.events == [
        "read", "send", "read", "send",
        "copy", "read", "send", "copy", "read", "send", "copy", "read", "send",
        "finish", "copy", "copy",
    ]  # fmt: skip


def test_copies_are_finished_after_an_error_too(
    array_source: ArraySourceMaker, late: LateDevice
) -> None:
    """No copy is left under way from memory that is about to be given back."""
    with pytest.raises(OSError, match="the disk is gone"):
        load(array_source, late, 1, fail_at=4)
    assert late.events[-2:] == ["finish", "copy"]
    assert late.under_way == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gpu_gets_what_the_cpu_gets(
    array_source: ArraySourceMaker, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many pieces, cast or not, onto complete rows and onto columns, behind a busy stream."""
    monkeypatch.setattr(bridge.loading, "_PIECE", 1 << 16)
    values = torch.randn(4096, 512, generator=torch.Generator().manual_seed(5)).numpy()
    tiles = (
        Tile("a", Box((0, 0), (4096, 256)), Box((0, 256), (4096, 512))),
        Tile("a", Box((1024, 256), (4096, 512)), Box((1024, 0), (4096, 256))),
        Tile("a", Box((0, 256), (1000, 512)), Box((24, 0), (1024, 256))),
        Tile(None, Box((0, 0), (24, 256)), Box((0, 0), (24, 256))),
    )
    filled = []
    for device in ("cpu", "cuda"):
        target = torch.empty(4096, 512, dtype=getattr(torch, dtype), device=device)
        if device == "cuda":
            torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        target.fill_(torch.nan)
        source = array_source({"a": values, "b": values[:8].copy()})
        rows = torch.empty(8, 512, dtype=getattr(torch, dtype), device=device)
        whole = Box.whole((8, 512))
        fill(
            [
                ("t", target, Tiling((4096, 512), tiles)),
                ("r", rows, Tiling((8, 512), (Tile("b", whole, whole),))),
            ],
            source,
            {"a": (4096, 512), "b": (8, 512)},
        )
        filled.append((target.cpu(), rows.cpu()))
    assert torch.equal(filled[0][0], filled[1][0])
    assert torch.equal(filled[0][1], filled[1][1])
