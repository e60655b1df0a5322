"""The layer between a command and the system: counts its calls, and does to one what a fault says.

Every function of `os` that reads or changes files is replaced by one that looks where the call
goes; only those below the trial's own directories count. Files of `open` are read and written in C,
past `os`: they are replaced by ones whose `read` and `write` are seen.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import io
import os
import signal
import stat
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from harness.torture.faults import TAKES_BYTES, Fault, answers
from harness.torture.power import Unsynced

Call = Callable[..., Any]

_WRITES: Final = {
    "mkdir": (0,), "rmdir": (0,), "unlink": (0,), "remove": (0,), "rename": (0, 1),
    "replace": (0, 1), "link": (1,), "symlink": (1,), "truncate": (0,), "ftruncate": (0,),
    "write": (0,), "writev": (0,), "pwrite": (0,), "pwritev": (0,), "posix_fallocate": (0,),
    "copy_file_range": (1,), "sendfile": (0,), "fsync": (0,), "fdatasync": (0,),
}  # fmt: skip
"""Functions of `os` that change something, and which of their arguments say where."""
_READS: Final = dict.fromkeys(
    ("read", "readv", "pread", "preadv", "stat", "lstat", "scandir", "listdir"), (0,)
)
_ENTERS: Final = {"mkdir": 0, "rename": 1, "replace": 1, "link": 1, "symlink": 1, "exchange": 1}
_LEAVES: Final = frozenset({"unlink", "remove", "rmdir", "rename", "replace"})
_PATCHED_WITH_OS: Final = ("bridge", "harness", "shutil", "tempfile", "pathlib", "fsspec", "glob")
"""Whose own names for these functions, taken at import, are replaced, too."""

_readlink, _lstat, _lseek = os.readlink, os.lstat, os.lseek
_real_open, _real_io_open = os.open, io.open
_real: Final[Mapping[str, Call]] = {
    name: getattr(os, name) for name in (*_WRITES, *_READS) if hasattr(os, name)
}


@dataclass(slots=True)
class Layer:
    """Counts calls, and lets one fault happen.

    Args:
        place: The trial's directory: what is changed below it counts, and what is read.
        sources: Directories of which reading counts.
        fault: What happens, and when; None only counts.
        die: Called before the process is killed, with what it was doing.
    """

    place: str
    sources: Sequence[str]
    fault: Fault | None
    die: Callable[[], None]
    counts: dict[str, int] = field(default_factory=lambda: {"w": 0, "r": 0})
    of_name: Counter[str] = field(default_factory=Counter)
    events: list[tuple[str, str, str]] = field(default_factory=list)
    struck: str = ""
    """The call that the fault happened to."""
    unsynced: Unsynced = field(default_factory=Unsynced)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _gone: str | None = None
    """Below where every call fails by now."""
    _resting: bool = False

    def install(self) -> None:
        """Put the layer in place, for the rest of this process."""
        replaced: dict[int, tuple[object, Call]] = {}
        for table, kind in ((_WRITES, "w"), (_READS, "r")):
            for name, where in table.items():
                if name in _real:
                    wrapper = self._wrapped(name, kind, where)  # type: ignore[arg-type]  # as above
                    replaced[id(_real[name])] = (_real[name], wrapper)
                    setattr(os, name, wrapper)
        replaced[id(_real_open)] = (_real_open, self._open)
        replaced[id(_real_io_open)] = (_real_io_open, self._io_open)
        ctypes.CDLL = functools.partial(_SeenLibrary, self)  # type: ignore[misc, assignment]  # as one calls it
        flock = fcntl.flock
        replaced[id(flock)] = (flock, self._wrapped("flock", "w", (0,), flock))
        for module in list(sys.modules.values()):
            name = getattr(module, "__name__", "")
            if name in {"os", "io", "_io", "builtins", "fcntl"} or (
                name.partition(".")[0] in _PATCHED_WITH_OS
                and not name.startswith("harness.torture")
            ):
                for attribute, value in list(vars(module).items()):
                    if id(value) in replaced:
                        setattr(module, attribute, replaced[id(value)][1])

    def rest(self) -> None:
        """Count no more: what follows is not the command's."""
        self._resting = True

    def _wrapped(
        self, name: str, kind: Literal["w", "r"], where: Sequence[int], real: Call | None = None
    ) -> Call:
        function = real or _real[name]

        def wrapper(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the function's own
            path = self._counted(kind, [args[at] for at in where if at < len(args)], kwargs)
            if path is None:
                return function(*args, **kwargs)
            return self._call(name, kind, path, function, args, kwargs)

        return wrapper

    def _open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:  # noqa: ANN401 - `os.open`'s
        changes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        kind: Literal["w", "r"] = "w" if changes else "r"
        found = self._counted(kind, [path], kwargs)
        if found is None:
            return _real_open(path, flags, *args, **kwargs)
        name = "create" if changes else "open"
        result: int = self._call(name, kind, found, _real_open, (path, flags, *args), kwargs)
        return result

    def _io_open(  # noqa: PLR0917 - `open`'s own signature
        self,
        file: Any,  # noqa: ANN401 - `open`'s
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,  # noqa: FBT001, FBT002 - as above
        opener: Call | None = None,
    ) -> Any:  # noqa: ANN401 - as above
        if self._counted("r", [file], {}) is None:
            return _real_io_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = _SeenFile(
            self, file, mode.replace("b", "").replace("t", ""), closefd=closefd, opener=opener
        )
        if buffering == 0:
            return raw
        stream: Any
        if raw.readable() and raw.writable():
            stream = io.BufferedRandom(raw)
        else:
            stream = io.BufferedReader(raw) if raw.readable() else io.BufferedWriter(raw)
        if "b" in mode:
            return stream
        return io.TextIOWrapper(stream, encoding, errors, newline)

    def _counted(self, kind: str, places: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """The path that a call is about, if it counts."""
        if self._resting:
            return None
        for at, place in enumerate(places):
            name = "dir_fd" if "dir_fd" in kwargs else ("src_dir_fd", "dst_dir_fd")[at]
            path = _path_of(place, kwargs.get(name))
            if _below(path, self.place):
                return path
            if kind == "r" and any(_below(path, source) for source in self.sources):
                return path
        return None

    def _call(
        self,
        name: str,
        kind: Literal["w", "r"],
        path: str,
        function: Call,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:  # noqa: ANN401 - the function's own
        with self._lock:
            self.counts[kind] += 1
            self.of_name[name] += 1
            if self.fault is None:
                self.events.append((kind, name, path))
            struck = self._strikes(name, kind, path)
            if struck and self.fault is not None and not self.fault.kills:
                raise OSError(self.fault.number, os.strerror(self.fault.number), path)
            if not struck:
                return self._done(name, path, function, args, kwargs)
            return self._kill(name, path, function, args, kwargs)

    def _strikes(self, name: str, kind: str, path: str) -> bool:
        fault = self.fault
        if fault is None or (not fault.kills and not answers(name, fault.how)):
            return False
        if self._gone is not None:
            return _below(path, self._gone)
        counted = self.of_name[name] if fault.on == "c" else self.counts[kind]
        if self.struck or counted < fault.at:
            return False
        if (fault.call or name) != name or fault.on not in {kind, "c"}:
            return False
        self.struck = f"{name} {path}"
        if fault.lasting:
            self._gone = next(one for one in (self.place, *self.sources) if _below(path, one))
        return True

    def _kill(
        self,
        name: str,
        path: str,
        function: Call,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        how = self.fault.how if self.fault is not None else ""
        if how == "half" and name in TAKES_BYTES:
            self._done(name, path, function, _half(name, args), kwargs)
        elif how != "before":
            self._done(name, path, function, args, kwargs)
        if how == "power":
            self.unsynced.lose()
        self.die()
        os.kill(os.getpid(), signal.SIGKILL)

    def _done(
        self,
        name: str,
        path: str,
        function: Call,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:  # noqa: ANN401 - the function's own
        """Do it, and keep account of what is not on the disk."""
        if name in TAKES_BYTES:
            descriptor = args[1] if name == "copy_file_range" else args[0]
            self.unsynced.before_write(descriptor)
            result = function(*args, **kwargs)
            self.unsynced.written(descriptor, _offset(name, args, result), result)
            return result
        fresh = name == "create" and not _exists(path)
        result = function(*args, **kwargs)
        if name in {"fsync", "fdatasync"}:
            self.unsynced.synced(args[0])
        elif name in {"posix_fallocate", "ftruncate"}:
            self.unsynced.resized(args[0])
        elif fresh:
            self.unsynced.entered(path)
        elif name in _ENTERS:
            self.unsynced.entered(_path_of(args[_ENTERS[name]], kwargs.get("dir_fd")))
        if name in _LEAVES:
            self.unsynced.left_out(_path_of(args[0], kwargs.get("dir_fd")))
        return result


class _SeenLibrary(ctypes.CDLL):
    """The C library, whose exchange of two names, which Python has not, goes through a layer."""

    def __init__(self, layer: Layer, name: str | None, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(name, **kwargs)
        self._seen_by = layer

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - `ctypes`'s
        function = super().__getattr__(name)
        return functools.partial(self._rename, function) if name == "renameat2" else function

    def _rename(
        self,
        function: Call,
        from_directory: int,
        old: bytes,
        directory: int,
        new: bytes,
        flags: int,
    ) -> int:
        def rename(source: bytes, target: bytes) -> int:
            result: int = function(from_directory, source, directory, target, flags)
            return result

        layer = self._seen_by
        path = layer._counted("w", [old, new], {})  # noqa: SLF001 - one of its own
        try:
            result: int = (
                rename(old, new)
                if path is None
                else layer._call("exchange", "w", path, rename, (old, new), {})  # noqa: SLF001
            )
        except OSError as error:
            ctypes.set_errno(error.errno or errno.EIO)
            return -1
        return result


class _SeenFile(io.FileIO):
    """A file whose reads and writes go through a layer."""

    def __init__(
        self,
        layer: Layer,
        file: Any,  # noqa: ANN401 - path or descriptor
        mode: str,
        *,
        closefd: bool,
        opener: Call | None,
    ) -> None:
        self._layer = layer
        super().__init__(file, mode, closefd, opener or os.open)

    def _through(self, name: str, function: Call, *args: Any) -> Any:  # noqa: ANN401
        kind: Literal["w", "r"] = "w" if name == "write" else "r"
        path = self._layer._counted(kind, [self.fileno()], {})  # noqa: SLF001 - one of its own
        if path is None:
            return function(*args)
        seen = (self.fileno(), *args)
        return self._layer._call(  # noqa: SLF001
            name, kind, path, lambda _, *rest: function(*rest), seen, {}
        )

    def write(self, data: Any, /) -> int:  # noqa: ANN401
        result: int = self._through("write", super().write, data)
        return result

    def readinto(self, buffer: Any, /) -> int:  # noqa: ANN401
        result: int = self._through("read", super().readinto, buffer)
        return result

    def readall(self) -> bytes:
        result: bytes = self._through("read", super().readall)
        return result


def _path_of(place: Any, directory: int | None) -> str:  # noqa: ANN401 - path or descriptor
    if isinstance(place, int):
        try:
            return _readlink(f"/proc/self/fd/{place}")
        except OSError:
            return ""
    path = os.fsdecode(place)
    if directory is not None and not path.startswith("/"):
        path = os.path.join(_path_of(directory, None), path)  # noqa: PTH118 - pathlib asks the system
    return os.path.abspath(path)  # noqa: PTH100 - as above


def _below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(f"{directory}/")


def _exists(path: str) -> bool:
    try:
        return stat.S_IFMT(_lstat(path).st_mode) != 0
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR}:
            return False
        raise


def _half(name: str, args: Sequence[Any]) -> Sequence[Any]:
    """The arguments of a call that takes half of the bytes, and at least one."""
    if name == "copy_file_range":
        return (*args[:2], max(1, args[2] // 2), *args[3:])
    if name == "sendfile":
        return (*args[:3], max(1, args[3] // 2), *args[4:])
    if name in {"writev", "pwritev"}:
        return (args[0], list(args[1])[: max(1, len(args[1]) // 2)], *args[2:])
    view = memoryview(args[1])
    return (args[0], view[: max(1, len(view) // 2)], *args[2:])


def _offset(name: str, args: Sequence[Any], nbytes: int) -> int:
    """Where the bytes that a call has taken went."""
    if name in {"pwrite", "pwritev"}:
        return int(args[2])
    if name == "copy_file_range":
        if len(args) > 4 and args[4] is not None:
            return int(args[4])
        return _lseek(args[1], 0, os.SEEK_CUR) - nbytes
    return _lseek(args[0], 0, os.SEEK_CUR) - nbytes
