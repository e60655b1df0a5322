"""A small checkpoint, a disk that gets full, and an object store that tests can watch and break.

The store is `store://`, in memory, through fsspec.
"""

# ruff: noqa: ANN401, D102 - most of it overrides fsspec's methods

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem

from bridge.storage import new_files
from harness.toys import toy_named, write_checkpoint
from tests.bridge.resuming import Failing


@pytest.fixture(scope="session")
def pristine_super_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Super-49B with every side file, written once; no test may touch it."""
    directory = tmp_path_factory.mktemp("super") / "hf"
    write_checkpoint(toy_named("super-49b-v1"), directory, dtype="bfloat16")
    return directory


@pytest.fixture
def super_checkpoint(pristine_super_checkpoint: Path, tmp_path: Path) -> Path:
    """The same at `tmp_path / "hf"`, the test's own to break."""
    return Path(shutil.copytree(pristine_super_checkpoint, tmp_path / "hf"))


class Call(NamedTuple):
    """One request: `start` and `stop` of a ranged read, None where all is read."""

    operation: str
    path: str
    start: int | None = None
    stop: int | None = None


def nothing(_: Call) -> None:
    """No trouble."""


class Store(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A memory filesystem of its own that says what it is asked, and fails as it is told.

    `trouble` is called before each request and may raise or change what is stored.
    """

    protocol = "store"
    store: dict[str, Any] = {}  # noqa: RUF012 - as in the base class
    pseudo_dirs: list[str] = [""]  # noqa: RUF012 - as in the base class
    calls: list[Call] = []  # noqa: RUF012 - of all instances, as the files are
    trouble: Callable[[Call], None] = staticmethod(nothing)
    short: int = 0
    """Bytes by which each ranged read is too short."""

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(super()._strip_protocol(str(path).rpartition("://")[2]))

    def _asked(self, operation: str, path: str, *span: int | None) -> None:
        call = Call(operation, path, *span)
        Store.calls.append(call)
        Store.trouble(call)

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        self._asked("read", path, start, end)
        if end is not None:
            end -= Store.short
        return bytes(super().cat_file(path, start=start, end=end, **kwargs))

    def info(self, path: str, **kwargs: Any) -> Any:
        self._asked("info", path)
        return super().info(path, **kwargs)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:  # noqa: FBT001, FBT002
        self._asked("list", path)
        return super().ls(path, detail=detail, **kwargs)

    def find(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._asked("list", path)
        return super().find(path, *args, **kwargs)

    def pipe_file(self, path: str, value: bytes, *args: Any, **kwargs: Any) -> None:
        self._asked("write", path)
        super().pipe_file(path, value, *args, **kwargs)

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        self._asked("upload", rpath)
        super().put_file(lpath, rpath, **kwargs)

    def rm_file(self, path: str) -> None:
        self._asked("remove", path)
        super().rm_file(path)

    @classmethod
    def files(cls) -> dict[str, bytes]:
        """Everything stored, by path without the leading slash."""
        return {path.lstrip("/"): file.getvalue() for path, file in cls.store.items()}

    @classmethod
    def fill(cls, files: dict[str, bytes]) -> None:
        """Hold just these."""
        cls.clear()
        fs = cls()
        for path, data in files.items():
            MemoryFileSystem.pipe_file(fs, path, data)

    @classmethod
    def clear(cls) -> None:
        """Forget everything, troubles included."""
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.calls.clear()
        cls.trouble = staticmethod(nothing)
        cls.short = 0


@pytest.fixture
def store() -> Iterator[type[Store]]:
    """An empty `store://`."""
    register_implementation("store", Store, clobber=True)
    Store.clear()
    yield Store
    Store.clear()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    """Let the disk be full after so many files; zero heals it."""
    finish = new_files.NewFile.finish
    left = [0]

    def full_disk(file: new_files.NewFile) -> None:
        left[0] -= 1
        if left[0] == 0:
            with file._refusals():
                raise OSError(28, "No space left on device", str(file.path))
        finish(file)

    def fail_after(count: int) -> None:
        left[0] = count + 1 if count else 0
        monkeypatch.setattr(new_files.NewFile, "finish", full_disk if count else finish)

    return fail_after
