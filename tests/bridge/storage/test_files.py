"""Reading byte ranges: any box of any array, every path of the reader, short and missing files."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import CheckpointError, CorruptFileError
from bridge.storage.files import FileRanges
from bridge.tiling import Box

ROOT = Path(__file__).parents[3]
WORD = np.dtype("<u2")
OFFSET = 24


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, FileRanges]]:
    """A directory and its reader, with one file of 3 MB of counting words behind an offset."""
    directory = tmp_path_factory.mktemp("ranges")
    (directory / "w").write_bytes(b"x" * OFFSET + np.arange(1_500_000, dtype=WORD).tobytes())
    with FileRanges(directory) as files:
        yield directory, files


def counting(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The array that the file holds from the offset on, taken as this shape."""
    return np.arange(math.prod(shape)).astype(WORD).reshape(shape)


@st.composite
def shapes_and_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    """Arrays of up to four dimensions, narrow rows and wide ones, and any box of them."""
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    wide = draw(st.booleans())
    if shape and wide:
        shape = (*shape[:-1], draw(st.integers(2000, 5000)))
    spans = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return shape, Box(tuple(a for a, _ in spans), tuple(b for _, b in spans))


@given(shapes_and_boxes(), st.integers(0, 3))
def test_any_box_is_read_into_any_view(
    shelf: tuple[Path, FileRanges], drawn: tuple[tuple[int, ...], Box], layout: int
) -> None:
    """Contiguous, strided, transposed and reversed targets all receive the array's own slice."""
    shape, box = drawn
    if layout == 0 or not box.shape:
        out = np.full(box.shape, 7, WORD)
    elif layout == 1:  # every second element of a larger array
        out = np.full([2 * n for n in box.shape], 7, WORD)[
            tuple(slice(None, None, 2) for _ in shape)
        ]
    elif layout == 2:  # column-major
        out = np.full(box.shape[::-1], 7, WORD).T
    else:
        out = np.full(box.shape, 7, WORD)[::-1]
    shelf[1].read_box("w", OFFSET, shape=shape, word=WORD, box=box, out=out)
    np.testing.assert_array_equal(out, counting(shape)[box.slices])


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((6, 4000), Box((1, 100), (5, 3000))),
        ((6, 4000), Box((1, 100), (5, 120))),
        ((6, 4000), Box((2, 100), (3, 120))),
        ((700, 2000), Box((0, 3), (700, 5))),
        ((4, 150_000, 2), Box((1, 20, 0), (3, 90_000, 1))),
        ((1, 300, 5), Box((0, 7, 0), (1, 9, 5))),
        ((9, 300), Box((2, 0), (7, 300))),
    ],
    ids=["wide", "narrow", "one row", "pieces", "stack", "one of a stack", "rows"],
)
@pytest.mark.parametrize("step", [1, 2], ids=["dense", "strided"])
def test_every_path_reads_the_slice_and_nothing_beside_it(
    shelf: tuple[Path, FileRanges], shape: tuple[int, ...], box: Box, step: int
) -> None:
    """Wide and narrow columns and stacks arrive, and all around the target stays as it was."""
    frame = np.full([step * n + 2 for n in box.shape], 7, WORD)
    inner = tuple(slice(1, -1, step) for _ in shape)
    shelf[1].read_box("w", OFFSET, shape=shape, word=WORD, box=box, out=frame[inner])
    np.testing.assert_array_equal(frame[inner], counting(shape)[box.slices])
    frame[inner] = 7
    assert (frame == 7).all()


def test_rows_of_one_slice_of_a_stack_cost_no_more_than_themselves(
    shelf: tuple[Path, FileRanges], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a band of one layer of stacked layers must not read the whole layer."""
    read = 0
    preadv = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read
        count = preadv(descriptor, buffers, offset)
        read += count
        return count

    monkeypatch.setattr(os, "preadv", counted)
    box = Box((1, 20, 0), (2, 30, 1000))
    out = np.empty(box.shape, WORD)
    shelf[1].read_box("w", OFFSET, shape=(2, 700, 1000), word=WORD, box=box, out=out)
    np.testing.assert_array_equal(out, counting((2, 700, 1000))[box.slices])
    assert read == out.nbytes


def test_short_reads_are_continued(
    shelf: tuple[Path, FileRanges], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may give less than was asked for; the rest is asked for again."""
    preadv = os.preadv

    def stingy(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(descriptor, [buffers[0][:3]], offset)

    monkeypatch.setattr(os, "preadv", stingy)
    out = np.empty(50, WORD)
    shelf[1].read_into("w", OFFSET + 20, out)
    np.testing.assert_array_equal(out, np.arange(10, 60))


def test_a_file_that_ends_early_is_corrupt(shelf: tuple[Path, FileRanges]) -> None:
    """The error says where the file ends and how much is missing."""
    with pytest.raises(CorruptFileError, match="ends at byte 3000024, 6 bytes early") as error:
        shelf[1].read_into("w", OFFSET + 3_000_000 - 14, np.empty(10, WORD))
    assert error.value.where == (str(shelf[0] / "w"),)


def test_a_file_that_is_not_there_is_an_error_of_ours(shelf: tuple[Path, FileRanges]) -> None:
    """A missing file is named."""
    with pytest.raises(CheckpointError, match="cannot open") as error:
        shelf[1].read_into("missing", 0, np.empty(1, WORD))
    assert error.value.where == (str(shelf[0] / "missing"),)


def test_a_directory_in_place_of_a_file_is_an_error_of_ours(tmp_path: Path) -> None:
    """What the system cannot read is reported with its reason."""
    (tmp_path / "w").mkdir()
    with (
        FileRanges(tmp_path) as files,
        pytest.raises(CheckpointError, match="cannot read") as caught,
    ):
        files.read_into("w", 0, np.empty(1, WORD))
    assert not isinstance(caught.value, CorruptFileError)  # which would give progress up


def test_threads_share_the_files(shelf: tuple[Path, FileRanges]) -> None:
    """Positional reads have no cursor to fight over."""
    failures = []

    def work(first: int) -> None:
        out = np.empty(1000, WORD)
        for start in range(first, 60_000, 4001):
            shelf[1].read_into("w", OFFSET + 2 * start, out)
            if not np.array_equal(out, np.arange(start, start + 1000)):
                failures.append(start)

    threads = [threading.Thread(target=work, args=(n * 97,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def num_open() -> int:
    """Number of file descriptors this process holds."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_close_gives_the_descriptors_back(tmp_path: Path) -> None:
    """Each file is opened once, and none is left open."""
    (tmp_path / "w").write_bytes(bytes(16))
    before = num_open()
    with FileRanges(tmp_path) as files:
        for _ in range(5):
            files.read_into("w", 0, np.empty(2, WORD))
        assert num_open() == before + 1
    assert num_open() == before


def refusing(code: int) -> Any:  # noqa: ANN401 - stands for os.copy_file_range
    """A system that does not copy, for this reason."""

    def refuse(*_: int) -> int:
        raise OSError(code, os.strerror(code))

    return refuse


def stingy(*args: int) -> int:
    """A system that copies seven bytes at a time."""
    source, target, nbytes, offset, at = args
    return _COPY(source, target, min(nbytes, 7), offset, at)


def stopping(*args: int) -> int:
    """A system that copies five bytes of sixty and then nothing more."""
    source, target, nbytes, offset, at = args
    return _COPY(source, target, 5, offset, at) if nbytes == 60 else 0


_COPY = os.copy_file_range
_SYSTEMS = {
    "kernel": _COPY,
    "short": stingy,
    "stops": stopping,
    **{
        errno.errorcode[code]: refusing(code)
        for code in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
    },
}


@pytest.mark.parametrize("system", _SYSTEMS.values(), ids=_SYSTEMS)
def test_bytes_are_copied_to_another_file_whatever_the_system_does(
    shelf: tuple[Path, FileRanges],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    system: Any,  # noqa: ANN401 - stands for os.copy_file_range
) -> None:
    """In the kernel, in part, or by hand: the same bytes at the same place, none beside them."""
    monkeypatch.setattr(os, "copy_file_range", system)
    (tmp_path / "new").write_bytes(b"." * 70)
    with (tmp_path / "new").open("r+b") as target:
        shelf[1].copy_to("w", OFFSET + 10, 60, target=target.fileno(), at=5)
    copied = np.arange(5, 35, dtype=WORD).tobytes()
    assert (tmp_path / "new").read_bytes() == b"." * 5 + copied + b"." * 5


def test_a_system_without_the_call_copies_by_hand(
    shelf: tuple[Path, FileRanges], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Python on macOS."""
    monkeypatch.delattr(os, "copy_file_range")
    with (tmp_path / "new").open("w+b") as target:
        shelf[1].copy_to("w", OFFSET, 20, target=target.fileno(), at=0)
    assert (tmp_path / "new").read_bytes() == np.arange(10, dtype=WORD).tobytes()


@pytest.mark.parametrize("system", [_COPY, refusing(errno.EXDEV)], ids=["kernel", "by hand"])
def test_a_source_that_ends_early_is_corrupt_when_it_is_copied(
    shelf: tuple[Path, FileRanges],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    system: Any,  # noqa: ANN401 - stands for os.copy_file_range
) -> None:
    """The kernel just copies nothing; the error tells where the file ends, as when reading it."""
    monkeypatch.setattr(os, "copy_file_range", system)
    with (
        (tmp_path / "new").open("w+b") as target,
        pytest.raises(CorruptFileError, match="ends at byte 3000024, 6 bytes early") as error,
    ):
        shelf[1].copy_to("w", OFFSET + 3_000_000 - 14, 20, target=target.fileno(), at=0)
    assert error.value.where == (str(shelf[0] / "w"),)


def test_a_target_that_cannot_be_written_is_not_the_sources_fault(
    shelf: tuple[Path, FileRanges], tmp_path: Path
) -> None:
    """What the kernel refused is tried by hand, and the system's own reason comes out."""
    (tmp_path / "new").write_bytes(b"")
    with (tmp_path / "new").open("rb") as target, pytest.raises(OSError, match="Bad file"):
        shelf[1].copy_to("w", OFFSET, 20, target=target.fileno(), at=0)


@pytest.mark.parametrize("start", [0, 1, 4096, 4097, 2_999_990])
def test_a_window_shows_the_bytes_from_any_position(
    shelf: tuple[Path, FileRanges], start: int
) -> None:
    """At the start of a page and inside one, up to the last byte of the file."""
    content = (shelf[0] / "w").read_bytes()
    nbytes = min(10_000, len(content) - start)
    with shelf[1].window("w", start, nbytes) as view:
        assert content[start : start + nbytes] == view


def test_a_window_beyond_the_end_is_an_error(shelf: tuple[Path, FileRanges]) -> None:
    """As reading there is."""
    with (
        pytest.raises(CorruptFileError, match="ends at byte 3000024, 24 bytes early"),
        shelf[1].window("w", 3_000_000, 48),
    ):
        pass


_CUT = """
import os, sys
from pathlib import Path
from bridge.storage.files import FileRanges
with FileRanges(Path()) as files, files.window("w", 0, 40_000) as view:
    os.truncate("w", 0)
    print(bytes(view) == bytes(range(100)) * 400)
"""


def test_a_file_cut_short_while_it_is_looked_at_is_no_signal(tmp_path: Path) -> None:
    """Who had mapped it would be killed by SIGBUS."""
    (tmp_path / "w").write_bytes(bytes(range(100)) * 400)
    done = subprocess.run(  # noqa: S603 - our own
        [sys.executable, "-c", _CUT], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_windows_that_are_open_at_once_show_bytes_of_their_own(
    shelf: tuple[Path, FileRanges],
) -> None:
    """And one that is closed lends its buffer to a longer one, and to a shorter one."""
    content = (shelf[0] / "w").read_bytes()
    for nbytes in (100, 5000, 10):
        with shelf[1].window("w", 0, nbytes) as one, shelf[1].window("w", 7, nbytes) as other:
            assert (bytes(one), bytes(other)) == (content[:nbytes], content[7 : 7 + nbytes])
