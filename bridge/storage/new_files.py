"""Files under construction: reserved at once, written by position, flushed meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Self

from bridge.errors import CheckpointError
from bridge.storage.extents import Extent
from bridge.storage.files import FileRanges, write_at
from bridge.storage.target import make_parents

# Python has no fdatasync on macOS.
_flush = getattr(os, "fdatasync", os.fsync)


class NewFile:
    """A file that did not exist, written from several threads.

    Args:
        directory: Is there.
        name: Below it; directories between them are created.
        size: In bytes.

    Raises:
        CheckpointError: BR300, from every method: the file exists, or the system refuses (disk
            full, permissions).
    """

    def __init__(self, directory: Path, name: str, size: int) -> None:
        self.path = directory / name
        with self._refusals():
            make_parents(directory, name)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                if size and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._descriptor, 0, size)  # a full disk is noticed early
            except OSError:
                os.close(self._descriptor)
                raise
        self._open = True
        self._lost: OSError | None = None

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"cannot write the file: {error.strerror}", where=str(self.path)
            ) from error

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of `data` at a position."""
        with self._refusals():
            write_at(self._descriptor, data, offset)

    def copy(self, files: FileRanges, extent: Extent, offset: int) -> None:
        """Write the bytes of another file at a position; see `FileRanges.copy_to`."""
        with self._refusals():
            files.copy_to(
                str(extent.path), extent.offset, extent.nbytes, target=self._descriptor, at=offset
            )

    def flush(self) -> None:
        """Bring to the disk what is written so far."""
        with self._refusals():
            self._flush(_flush)

    def finish(self) -> None:
        """Bring everything to the disk and close."""
        with self._refusals():
            self._flush(os.fsync)
        self.close()

    def _flush(self, function: Callable[[int], None]) -> None:
        """The system reports a failed write-back once: the next flush would pass over it."""
        if self._lost is not None:
            raise self._lost
        try:
            function(self._descriptor)
        except OSError as error:
            self._lost = error
            raise

    def close(self) -> None:
        """Close, if that is not done yet."""
        if self._open:
            self._open = False
            os.close(self._descriptor)


class Flusher:
    """Brings files to the disk while others, or the rest of them, are written.

    Without it all waiting for the disk would come at the end. Leaving the block without an error
    waits until every file handed to `finish` is on the disk; any way out closes all files.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._files: list[NewFile] = []
        self._flushing: dict[NewFile, Future[None]] = {}
        self._submitted: list[Future[None]] = []
        self._lock = Lock()

    def create(self, directory: Path, name: str, size: int) -> NewFile:
        """A new file, closed at the end of the block at the latest."""
        file = NewFile(directory, name, size)
        self._files.append(file)
        return file

    def start(self, file: NewFile) -> None:
        """Begin to flush what is written of a file, unless a flush of it is under way."""
        with self._lock:
            running = self._flushing.get(file)
            if running is None or running.done():
                self._flushing[file] = self._submit(file.flush)

    def finish(self, file: NewFile, then: Callable[[], None] | None = None) -> None:
        """Flush and close a file that is complete, and do something after it, in the background."""

        def finish() -> None:
            file.finish()
            if then is not None:
                then()

        with self._lock:
            self._submit(finish)

    def _submit(self, work: Callable[[], None]) -> Future[None]:
        future = self._pool.submit(work)
        # The system reports a failed write-back once: each result has to be looked at.
        self._submitted.append(future)
        return future

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                wait(self._submitted)
                for future in self._submitted:
                    future.result()
        finally:
            self._pool.shutdown(cancel_futures=True)
            for file in self._files:
                with suppress(OSError):
                    file.close()
