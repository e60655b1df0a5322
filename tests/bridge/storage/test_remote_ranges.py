"""Ranges behind a URL: each byte is asked for once, by many threads, and ends where it should."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from bridge.errors import CheckpointError, CorruptFileError
from bridge.storage import remote_ranges
from bridge.storage.files import FileRanges
from bridge.storage.remote import RemotePath, parse_location
from bridge.storage.remote_ranges import RemoteRanges, each_file, open_ranges

Store: TypeAlias = Any
Call: TypeAlias = Any
"""Those of `conftest`, which no test can import."""


class BackendError(Exception):
    """What botocore, google and httpx raise: nothing that derives from OSError."""


def remote(url: str) -> RemotePath:
    """A location that is one behind a URL."""
    found = parse_location(url)
    assert isinstance(found, RemotePath)
    return found


def test_large_reads_ask_for_each_byte_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts, all of which land in their place."""
    monkeypatch.setattr(remote_ranges, "PART_NBYTES", 100)
    data = np.arange(1000, dtype="<u2")
    store.fill({"bucket/w": b"head" + data.tobytes()})
    out = np.zeros(700, "<u2")
    with open_ranges(remote("store://bucket")) as ranges:
        ranges.read_into("w", 4 + 2 * 50, out)
    assert (data[50:750] == out).all()
    spans = sorted((call.start, call.stop) for call in store.calls)
    assert [(start, start + 100) for start in range(104, 1504, 100)] == spans


def test_many_threads_read_together(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """More readers than requests may be in flight: nobody waits for ever, all get their bytes."""
    monkeypatch.setattr(remote_ranges, "PART_NBYTES", 64)
    data = np.arange(4096, dtype="<u2")
    store.fill({"bucket/w": data.tobytes()})
    outs = [np.zeros(256, "<u2") for _ in range(16)]
    with RemoteRanges(remote("store://bucket")) as ranges, ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: ranges.read_into("w", 512 * n, outs[n]), range(16)))
    assert (data == np.concatenate(outs)).all()


@pytest.mark.parametrize("part", [1 << 20, 8])
def test_a_short_read_is_a_file_that_ends_early(
    store: Store, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    """Whether the object is short or the backend gives less than it was asked for."""
    monkeypatch.setattr(remote_ranges, "PART_NBYTES", part)
    store.fill({"bucket/w": bytes(40)})
    with RemoteRanges(remote("store://bucket")) as ranges:
        with pytest.raises(CorruptFileError, match="ends at byte 40, 4 bytes early"):
            ranges.read_into("w", 4, np.zeros(20, "<u2"))
        store.short = 3
        with pytest.raises(CorruptFileError, match="3 bytes early"):
            ranges.read_into("w", 0, np.zeros(20, "<u2"))


def test_after_a_failed_read_nobody_writes_to_the_buffer(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts that were under way are waited for: the buffer is the caller's again."""
    monkeypatch.setattr(remote_ranges, "PART_NBYTES", 4)
    store.fill({"bucket/w": bytes(range(40))})
    under_way = []

    def fail_at_the_first(call: Call) -> None:
        under_way.append(call)
        try:
            if call.start == 0:
                raise BackendError("reset by peer")
            slow.wait(0.2)
        finally:
            under_way.remove(call)

    slow = threading.Event()
    store.trouble = staticmethod(fail_at_the_first)
    with RemoteRanges(remote("store://bucket")) as ranges:
        with pytest.raises(CheckpointError, match="reset by peer"):
            ranges.read_into("w", 0, np.zeros(20, "<u2"))
        assert under_way == []


def test_a_file_that_is_gone_is_an_error_of_ours(store: Store) -> None:
    """BR300, with the URL."""
    store.fill({"bucket/w": bytes(4)})
    with (
        RemoteRanges(remote("store://bucket")) as ranges,
        pytest.raises(CheckpointError, match="No such file") as caught,
    ):
        ranges.read_into("v", 0, np.zeros(2, "<u2"))
    assert caught.value.where == ("store:///bucket/v",)


def test_local_directories_are_read_as_ever(tmp_path: Path) -> None:
    """Without threads or requests."""
    with open_ranges(tmp_path) as ranges:
        assert type(ranges) is FileRanges


@pytest.mark.parametrize("url", ["store://bucket", "here"])
def test_each_file_is_read_in_its_order(store: Store, tmp_path: Path, url: str) -> None:
    """The first error of several is the one that is raised."""
    del store
    directory = tmp_path if url == "here" else remote(url)
    assert list(each_file(directory, str.upper, ["b", "a", "c"]).items()) == [
        *(("b", "B"), ("a", "A"), ("c", "C"))
    ]

    def fail(name: str) -> str:
        if name == "a":
            time.sleep(0.05)
        if name != "b":
            raise CheckpointError(f"{name} is damaged")
        return name

    with pytest.raises(CheckpointError, match="a is damaged"):
        each_file(directory, fail, ["b", "a", "c"])


def test_requests_for_several_files_are_under_way_together(store: Store) -> None:
    """Each waits for the other to begin."""
    del store
    meeting = threading.Barrier(2, timeout=30)
    each_file(remote("store://bucket"), lambda _: meeting.wait(), ["a", "b"])
