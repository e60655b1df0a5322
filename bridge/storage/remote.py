"""Places that a URL names, `s3://bucket/model` and the like, through fsspec.

A `RemotePath` has the part of pathlib's interface that the bridge reads with, so whatever takes a
`Path` takes one too. It is not universal_pathlib's: what a backend raises (botocore's, google's and
httpx's exceptions are no OSErrors) has to become an error of ours at the place where it happens,
and listings have to answer for the files in them, because each question is a request.

fsspec and a backend are imported when the first URL is seen. Credentials are the backend's affair.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple, Self, TypeAlias
from urllib.parse import unquote, urlsplit

from bridge.errors import BridgeError, CheckpointError, EnvironmentMissingError, UsageError

_SEPARATOR: Final = "://"
_LOCAL: Final = "file"
# Of s3fs, gcsfs, adlfs, huggingface_hub, local and other file systems, the surest first.
_VERSIONS: Final = (
    *("ETag", "etag", "md5Hash", "content_settings_md5", "crc32c", "blob_id", "generation"),
    *("mtime", "LastModified", "last_modified", "updated", "created"),
)
_BUGS: Final = (AssertionError, AttributeError, NameError, TypeError)


class RemoteStat(NamedTuple):
    """What `RemotePath.stat` tells."""

    st_size: int


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A file or directory of an fsspec filesystem.

    A directory of an object store is a prefix: it exists while an object lies below it. Absent
    files raise FileNotFoundError as pathlib's do; all else that goes wrong is CheckpointError
    BR300 with the URL.

    Args:
        fs: The fsspec filesystem, whose threads may all use it at once.
        path: Without protocol, as the filesystem spells it.
    """

    fs: Any
    path: str
    _listed: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    """What a listing said of it; spares a request."""

    def __str__(self) -> str:
        """The URL."""
        return str(self.fs.unstrip_protocol(self.path))

    def __lt__(self, other: RemotePath) -> bool:
        """Sort as pathlib does, by parts."""
        return PurePosixPath(self.path) < PurePosixPath(other.path)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.fs, f"{self.path.rstrip('/')}/{name}")

    @property
    def protocols(self) -> frozenset[str]:
        """The names of the filesystem, as URLs begin with them."""
        names = self.fs.protocol
        return frozenset({names} if isinstance(names, str) else names)

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(self.path).name

    @property
    def suffix(self) -> str:
        """The last part's extension, with its dot."""
        return PurePosixPath(self.path).suffix

    @property
    def parent(self) -> RemotePath:
        """Without the last part; of `/model`, as some backends spell it, the root."""
        head, slash, _ = self.path.rstrip("/").rpartition("/")
        return RemotePath(self.fs, head or slash)

    def absolute(self) -> RemotePath:
        """Itself: a URL is."""
        return self

    def resolve(self) -> RemotePath:
        """Itself: there are no links."""
        return self

    def relative_to(self, other: RemotePath) -> PurePosixPath:
        """The path from a directory to what is in it."""
        return PurePosixPath(self.path).relative_to(PurePosixPath(other.path))

    def exists(self) -> bool:
        """Whether there is a file or a directory."""
        return self._info() is not None

    def is_file(self) -> bool:
        """Whether there is a file."""
        return (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        """Whether there is a directory, or an object below this prefix."""
        return (self._info() or {}).get("type") == "directory"

    def is_symlink(self) -> bool:
        """Never."""
        return False

    def stat(self) -> RemoteStat:
        """The size in bytes."""
        info = self._info()
        if info is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return RemoteStat(int(info["size"]))

    def version(self) -> str:
        """What the backend has to tell contents of one size apart; empty where it has nothing."""
        info = self._info() or {}
        return next((f"{key} {info[key]}" for key in _VERSIONS if info.get(key)), "")

    def iterdir(self) -> Iterator[RemotePath]:
        """What is directly in the directory, from one listing."""
        with backend_errors(str(self)):
            found = self.fs.ls(self.path, detail=True)
        yield from self._children({entry["name"]: entry for entry in found})

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """What is directly in the directory and whose name fits."""
        return (child for child in self.iterdir() if fnmatchcase(child.name, pattern))

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        """Every file below the directory whose name fits; no directories."""
        with backend_errors(str(self)):
            found = self.fs.find(self.path, detail=True)
        return (
            child
            for child in self._children(found)
            if child.is_file() and fnmatchcase(child.name, pattern)
        )

    def _children(self, found: Mapping[str, Mapping[str, Any]]) -> Iterator[RemotePath]:
        own = self.path.rstrip("/")
        for name, entry in found.items():
            path = name.rstrip("/")
            if path != own:  # a store's own mark of a directory
                yield RemotePath(self.fs, path, entry)

    def read_bytes(self) -> bytes:
        """The whole file."""
        with backend_errors(str(self)):
            return bytes(self.fs.cat_file(self.path))

    def read_text(self, *, encoding: str) -> str:
        """The whole file, decoded."""
        return self.read_bytes().decode(encoding)

    def read_range(self, start: int, stop: int) -> bytes:
        """Some bytes of the file, and no more; fewer where it ends."""
        # An asynchronous filesystem sends one ranged request. Others open the file, and read ahead
        # unless they are told not to.
        options = {} if self.fs.async_impl else {"cache_type": "none"}
        with backend_errors(str(self)):
            return bytes(self.fs.cat_file(self.path, start=start, end=stop, **options))

    def open(self, mode: str) -> RemoteStream:
        """A stream over the file, which `read`s just what it is asked for."""
        if mode != "rb":
            raise ValueError(f"mode {mode!r}")
        return RemoteStream(self)

    def forget_listings(self) -> None:
        """See the filesystem as it is now, whatever was listed before."""
        self.fs.invalidate_cache()

    def _info(self) -> Mapping[str, Any] | None:
        if self._listed is not None:
            return self._listed
        try:
            with backend_errors(str(self)):
                return dict(self.fs.info(self.path))
        except FileNotFoundError:
            return None


class RemoteStream:
    """A cursor over ranged reads."""

    def __init__(self, path: RemotePath) -> None:
        self._path = path
        self._position = 0

    def read(self, size: int) -> bytes:
        """The next bytes; fewer where the file ends."""
        data = self._path.read_range(self._position, self._position + size) if size else b""
        self._position += len(data)
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held open."""


Location: TypeAlias = Path | RemotePath
"""Where a checkpoint is or shall be."""


def is_url(text: str) -> bool:
    """Whether a word of the command line is a URL and no path."""
    return _SEPARATOR in text


def parse_location(text: str) -> Location:
    """Read a path or an fsspec URL. `file://` is a path, with all that only paths can do.

    Raises:
        UsageError: BR001, a protocol that fsspec does not know, or a URL without a path.
        EnvironmentMissingError: BR500, the protocol's package is not installed.
        CheckpointError: BR300, the backend refuses to start.
    """
    if not is_url(text):
        return Path(text)
    protocol = text.partition(_SEPARATOR)[0]
    if protocol == _LOCAL:
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise UsageError(
                f"{parts.netloc!r} is no path of this machine",
                where=text,
                hint="a local file's URL has three slashes: file:///path",
            )
        return Path(unquote(parts.path))
    try:
        from fsspec.core import url_to_fs
        from fsspec.registry import get_filesystem_class, known_implementations
    except ImportError as error:
        raise EnvironmentMissingError(
            f"a URL needs fsspec: {error}", where=text, hint="pip install fsspec"
        ) from None
    try:
        get_filesystem_class(protocol)
    except ValueError:
        raise UsageError(
            f"unknown protocol {protocol!r}",
            where=text,
            hint="give a path, or a URL such as s3://BUCKET/PATH or hf://ORG/NAME",
        ) from None
    except ImportError as error:
        module = str(known_implementations.get(protocol, {}).get("class", "")).partition(".")[0]
        raise EnvironmentMissingError(
            f"{protocol}:// needs a package that is not installed: {error}",
            where=text,
            hint=f"pip install {module}" if module not in ("", "fsspec") else None,
        ) from None
    with backend_errors(text):
        fs, path = url_to_fs(text)
    if not path.strip("/"):
        raise UsageError("the URL has no path", where=text, hint=f"write {protocol}://BUCKET/PATH")
    return RemotePath(fs, path)


@contextmanager
def backend_errors(where: str) -> Iterator[None]:
    """Turn whatever a backend raises into an error of ours.

    Absence stays a FileNotFoundError, which is not always an error; ImportErrors and bugs pass.

    Raises:
        CheckpointError: BR300, permissions, network, or anything else the backend complains of.
    """
    try:
        yield
    except (BridgeError, ImportError, *_BUGS):
        raise
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), where) from None
    except Exception as error:  # no two backends share a base class for theirs
        raise CheckpointError(
            f"cannot reach it: {reason(error)}", where=where, hint=_hint(error)
        ) from error


def reason(error: BaseException) -> str:
    """The first line of what an exception says, or else its name."""
    said = getattr(error, "strerror", None) or str(error)
    return str(said).strip().partition("\n")[0] or type(error).__name__


def _hint(error: Exception) -> str:
    if isinstance(error, PermissionError) or "redential" in str(error):
        return (
            "the backend finds its credentials itself (environment, configuration files, the "
            "machine's role): check that they are there and may do this"
        )
    return "check the URL, the network and the credentials; the backend has already tried again"
