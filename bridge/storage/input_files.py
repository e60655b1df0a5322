"""Opening files of strangers: the one place where a checkpoint's files are opened for reading.

A checkpoint is a directory, and what it names lies in it. A link could lead to a private key, which
an export would then carry along; a FIFO blocks whoever opens it for ever; a device does what it
does. So a file is opened if it is a regular one and if its real place is below the directory that
it is named in. The cache of the Hub is made of links, into the same model's `blobs`: those are
followed. All others are by the user's word alone.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import IO, Final, ParamSpec, TypeVar

from bridge.errors import CorruptFileError, UnsafeFileError
from bridge.storage.remote import Location, RemotePath, RemoteStream

FOLLOW_LINKS: Final = "NEMOTRON_BRIDGE_FOLLOW_LINKS"
"""The environment variable that lets links lead anywhere: for processes that are started, too."""
MAX_JSON: Final = 64 << 20
"""Bytes of a file that is parsed whole; the largest known is an index of 150 kB."""
MAX_WHOLE: Final = 1 << 30
"""Bytes of a file that is read whole: tokenizers have tens of MB, metadata of a save less."""

_follows: ContextVar[bool] = ContextVar("follows", default=False)
_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_MAX_NAME: Final = 255  # bytes
_REPOSITORIES: Final = ("models--", "datasets--", "spaces--")  # of the Hub's cache

Params = ParamSpec("Params")
Result = TypeVar("Result")


def follow_links_from_now_on() -> None:
    """Let links lead anywhere, in this process and those it starts: what `--follow-links` does."""
    os.environ[FOLLOW_LINKS] = "1"


@contextmanager
def following_links(follow: bool) -> Iterator[None]:  # noqa: FBT001 - it says what it means
    """Let links lead anywhere while the block runs, or as the environment says."""
    token = _follows.set(follow or _follows.get())
    try:
        yield
    finally:
        _follows.reset(token)


def obeys_follow_links(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Make a function that takes `options` do as `options.follow_links` says."""

    @wraps(function)
    def obeying(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        with following_links(getattr(kwargs.get("options"), "follow_links", False)):
            return function(*args, **kwargs)

    return obeying


def links_are_followed() -> bool:
    """Whether links may lead anywhere, by the environment or the block that runs."""
    return _follows.get() or os.environ.get(FOLLOW_LINKS) == "1"


def is_plain_name(name: str) -> bool:
    """Whether a string names a file directly in a directory, on any system."""
    return (
        name not in {"", ".", ".."}
        and name.isprintable()
        and len(name.encode()) <= _MAX_NAME
        and not any(separator in name for separator in "/\\")
    )


def refuse_link_out(path: Location, *, follow: bool | None = None) -> None:
    """Refuse a file or directory whose real place is not below the directory it is named in.

    Args:
        path: What is named. Behind a URL there are no links.
        follow: Whether links may lead anywhere; None asks `links_are_followed`.

    Raises:
        UnsafeFileError: BR307, it leads elsewhere, or no file can be called that.
    """
    if isinstance(path, RemotePath) or (links_are_followed() if follow is None else follow):
        return
    try:
        parent = Path(os.path.realpath(path.parent))
        real = Path(os.path.realpath(path))
    except ValueError as error:  # a NUL, half a surrogate pair
        raise UnsafeFileError(f"no file has such a name: {error}", where=str(path)) from None
    if real.is_relative_to(parent) or _is_blob(real, parent):
        return
    raise UnsafeFileError(
        f"a link leads out of the directory, to {real}",
        where=str(path),
        hint="put the file itself there; or, if you know where the links lead, allow it with "
        f"--follow-links ({FOLLOW_LINKS}=1, ConversionOptions(follow_links=True))",
    )


def _is_blob(real: Path, parent: Path) -> bool:
    """Whether a file is one of the blobs of the Hub's cache that the snapshot at `parent` is of."""
    for snapshots in (parent, *parent.parents):
        root = snapshots.parent
        if snapshots.name == "snapshots" and root.name.startswith(_REPOSITORIES):
            return real.parent == root / "blobs"
    return False


def open_input(path: Path, *, follow: bool | None = None) -> int:
    """Open a regular file for reading.

    Args:
        path: The file, whose directory is the checkpoint's or below.
        follow: As `refuse_link_out` takes it.

    Returns:
        A descriptor.

    Raises:
        UnsafeFileError: BR307, a FIFO, a device, a socket, or a link that leads elsewhere.
        OSError: The system refuses, or it is a directory.
    """
    refuse_link_out(path, follow=follow)
    try:
        _refuse_irregular(path.stat().st_mode, path)  # opening a device may do something
    except ValueError as error:
        raise UnsafeFileError(f"no file has such a name: {error}", where=str(path)) from None
    descriptor = os.open(path, _FLAGS)
    try:
        _refuse_irregular(os.fstat(descriptor).st_mode, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_irregular(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # reading a directory tells by itself
        raise UnsafeFileError(
            "it is a FIFO, a device or a socket, not a file",
            where=str(path),
            hint="remove it: no checkpoint has such a thing",
        )


def open_stream(path: Location) -> IO[bytes] | RemoteStream:
    """A stream over a file, here or behind a URL. Raises as `open_input`."""
    if isinstance(path, RemotePath):
        return path.open("rb")
    return os.fdopen(open_input(path), "rb")


def read_input(path: Location, *, most: int = MAX_WHOLE) -> bytes:
    """Read a file whole.

    Args:
        path: The file. What a URL names is not measured first.
        most: Bytes that it may have.

    Raises:
        UnsafeFileError: BR307, as `open_input`.
        CorruptFileError: BR302, a bigger file.
        OSError: The system refuses.
    """
    if isinstance(path, RemotePath):
        return path.read_bytes()
    with os.fdopen(open_input(path), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise CorruptFileError(
                f"the file has {size} bytes, and one of its kind has {most} at most",
                where=str(path),
                hint="remove it if it does not belong there, or copy it again",
            )
        return stream.read()
