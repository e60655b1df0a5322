"""Positional reads of files behind a URL: ranged requests, several at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from bridge.dtypes import Words
from bridge.errors import CheckpointError, CorruptFileError
from bridge.reading import all_or_first_error
from bridge.storage.files import FileRanges
from bridge.storage.remote import Location, RemotePath

Result = TypeVar("Result")

PART_NBYTES: Final = 8 << 20
"""Bytes of one request: its latency is small beside its transfer."""
REQUESTS: Final = 8
"""In flight together. A store serves one stream at tens of MB/s, and many at once."""


class RemoteRanges(FileRanges):
    """Files of one remote directory, read by position.

    Besides the buffers of whoever reads, `REQUESTS * PART_NBYTES` (64 MiB) are held at most.

    Args:
        directory: What the names are in.
    """

    def __init__(self, directory: RemotePath) -> None:
        super().__init__(Path())
        self._root = directory
        self._pool = ThreadPoolExecutor(REQUESTS, thread_name_prefix="remote-read")

    def read_into(self, name: str, offset: int, out: Words) -> None:
        """Fill a C-contiguous array from `offset` on; every byte is asked for once.

        Raises:
            CorruptFileError: BR302, the file ends first.
            CheckpointError: BR300, the backend fails.
        """
        path = self._root / name
        view = memoryview(out.reshape(-1).view("u1").data)
        parts = [
            (offset + start, view[start : start + PART_NBYTES])
            for start in range(0, len(view), PART_NBYTES)
        ]
        if len(parts) == 1:
            _fill(path, *parts[0])
            return
        # However it ends, the buffer is the caller's again: nobody may still write to it.
        all_or_first_error(self._pool.submit(_fill, path, *part) for part in parts)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)


def _fill(path: RemotePath, offset: int, view: memoryview) -> None:
    try:
        data = path.read_range(offset, offset + len(view))
    except FileNotFoundError as error:
        raise CheckpointError(f"cannot open the file: {error.strerror}", where=str(path)) from None
    if len(data) != len(view):
        raise CorruptFileError(
            f"the file ends at byte {offset + len(data)}, {len(view) - len(data)} bytes early",
            where=str(path),
            hint="copy or download the file again",
        )
    view[:] = data


def open_ranges(directory: Location) -> FileRanges:
    """Positional reads of the files of a directory, wherever it is."""
    return RemoteRanges(directory) if isinstance(directory, RemotePath) else FileRanges(directory)


def each_file(
    directory: Location, read: Callable[[str], Result], names: Sequence[str]
) -> dict[str, Result]:
    """What `read` gives for every name; several at once where each is a request or more.

    Args:
        directory: What the names are in.
        read: Of one of them.
        names: In the order of the result. Of several errors the first one's is raised.
    """
    if not isinstance(directory, RemotePath):
        return {name: read(name) for name in names}
    with ThreadPoolExecutor(REQUESTS) as pool:
        return dict(zip(names, pool.map(read, names), strict=True))
