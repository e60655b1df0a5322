"""A checkpoint behind a URL is visible when it is complete, and before that nowhere."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from bridge.errors import CheckpointError, TargetExistsError
from bridge.storage import remote_target
from bridge.storage.remote import RemotePath, parse_location
from bridge.storage.remote_target import MARKER_NAME, NewPrefix, new_prefix
from bridge.storage.source import FileLayout, Payload
from bridge.storage.staging_directory import staging_directory
from bridge.tiling import Box, Tile, Tiling
from bridge.transfer import TransferLimits

Store: TypeAlias = Any
Call: TypeAlias = Any
"""Those of `conftest`, which no test can import."""

LIMITS = TransferLimits(threads=2)
WORDS = np.arange(24, dtype=np.uint16)
WHOLE = Tiling((24,), (Tile("w", Box((0,), (24,)), Box((0,), (24,))),))
LAYOUTS = [
    FileLayout(
        path=f"iter/{name}",
        size=4 + 2 * (stop - start) + 1,
        literals=((0, b"head"), (4 + 2 * (stop - start), b"!")),
        payloads=(
            Payload(tensor="t", box=Box((start,), (stop,)), offset=4, nbytes=2 * (stop - start)),
        ),
    )
    for name, start, stop in (("a", 0, 16), ("b", 16, 24))
]
LAST = ("index", "tracker")
EXPECTED = {
    "bucket/model/iter/a": b"head" + WORDS[:16].tobytes() + b"!",
    "bucket/model/iter/b": b"head" + WORDS[16:].tobytes() + b"!",
    "bucket/model/side/tokenizer": b"side",
    "bucket/model/index": b"index",
    "bucket/model/tracker": b"0",
}
MARKER = f"bucket/model/{MARKER_NAME}"
VISIBLE = {"bucket/model/index", "bucket/model/tracker"}


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def target(store: Store) -> RemotePath:
    """Where the checkpoint goes."""
    assert store.files() == {}
    found = parse_location("store://bucket/model")
    assert isinstance(found, RemotePath)
    return found


Write = Callable[..., list[int]]


@pytest.fixture
def write(target: RemotePath, tmp_path: Path, array_source: Callable[..., Any]) -> Write:
    """Write the whole checkpoint, the tracker before other files; the bytes reported."""

    def writer(
        during: Callable[[NewPrefix], None] = lambda _: None, *, overwrite: bool = False
    ) -> list[int]:
        reported: list[int] = []
        with new_prefix(target, overwrite=overwrite, staging=tmp_path, last=LAST) as new:
            new.write_small_file("tracker", b"0")
            new.write_files(
                LAYOUTS,
                array_source({"w": WORDS}),
                {"t": WHOLE},
                limits=LIMITS,
                advance=reported.append,
            )
            new.write_small_file("index", b"index")
            new.write_small_file("side/tokenizer", b"side")
            during(new)
        return reported

    return writer


def test_the_files_are_those_of_their_layouts_and_nothing_else_is_left(
    store: Store, write: Write, tmp_path: Path
) -> None:
    """Neither the marker, nor anything in the staging directory."""
    write()
    assert store.files() == EXPECTED
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_what_is_built_and_what_is_sent(write: Write, target: RemotePath) -> None:
    """To the byte, so that the bar comes out full."""
    new = NewPrefix(target, None, LAST)
    assert sum(map(new.effort, LAYOUTS)) == 48 + len(
        EXPECTED["bucket/model/iter/a"] + EXPECTED["bucket/model/iter/b"]
    )
    assert sum(write()) == sum(map(new.effort, LAYOUTS))


def test_until_the_end_no_file_is_there_that_makes_it_a_checkpoint(
    store: Store, write: Write, tmp_path: Path
) -> None:
    """The rest is, marked, and can be read back."""
    seen: list[set[str]] = []

    def look(new: NewPrefix) -> None:
        seen.append(set(store.files()))
        assert (new.place / "side/tokenizer").read_bytes() == b"side"
        assert all(not any(path.iterdir()) for path in tmp_path.iterdir())

    write(look)
    assert seen == [{*EXPECTED, MARKER} - VISIBLE]


def test_one_file_is_staged_at_a_time(store: Store, write: Write, tmp_path: Path) -> None:
    """Room for the largest is enough."""
    staged: list[list[str]] = []

    def look(call: Call) -> None:
        if call.operation == "upload":
            staged.append([path.name for path in tmp_path.rglob("*") if path.is_file()])

    store.trouble = staticmethod(look)
    write()
    assert staged == [["a"], ["b"]]


def test_a_backend_that_reports_no_progress_comes_out_even(
    store: Store, write: Write, target: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's, for one."""
    true = store.put_file

    def put_file(fs: object, local: str, path: str, **_: object) -> None:
        true(fs, local, path)

    monkeypatch.setattr(store, "put_file", put_file)
    assert sum(write()) == sum(map(NewPrefix(target, None, LAST).effort, LAYOUTS))


def test_the_last_files_are_uploaded_in_their_order(store: Store, write: Write) -> None:
    """And the marker goes when they are there."""
    write()
    done = [(call.operation, call.path.rpartition("/")[2]) for call in store.calls]
    changes = [one for one in done if one[0] in {"write", "upload", "remove"}]
    assert changes[0] == ("write", MARKER_NAME)
    assert changes[-3:] == [("write", "index"), ("write", "tracker"), ("remove", MARKER_NAME)]


def test_whichever_request_fails_nothing_is_left(
    store: Store, write: Write, tmp_path: Path
) -> None:
    """Each in turn; the attempt after it succeeds."""
    write()
    num_calls = len(store.calls)
    assert num_calls > 12
    for number in range(num_calls):
        store.clear()

        def fail_once(_: Call, number: int = number) -> None:
            if len(store.calls) == number + 1:
                raise OSError(errno.ECONNRESET, "reset by peer")

        store.trouble = staticmethod(fail_once)
        with pytest.raises(CheckpointError, match="reset by peer"):
            write()
        assert store.files() == {}, store.calls[number]
        assert list(tmp_path.iterdir()) == []
        write()
        assert store.files() == EXPECTED


def test_whenever_it_is_killed_the_next_attempt_clears_up(store: Store, write: Write) -> None:
    """Before each request: what is there then is no checkpoint, unless it is a complete one."""
    left: list[dict[str, bytes]] = []
    store.trouble = staticmethod(lambda _: left.append(store.files()))
    write()
    assert len(left) > 12
    for files in left:
        names = set(files)
        assert not names & VISIBLE or names >= {*EXPECTED} - {"bucket/model/tracker"}
        assert "bucket/model/tracker" not in names or names >= {*EXPECTED}
        assert MARKER in names or names in (set(), {*EXPECTED})
        if MARKER in names:
            store.clear()
            store.fill(files)
            write()
            assert store.files() == EXPECTED


def test_what_a_killed_worker_staged_goes_with_the_failure(
    write: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its process could not; nobody else would before the next conversion."""
    worker = (
        "import os, pathlib, signal\n"
        "from bridge.storage.staging_directory import staging_directory\n"
        f"with staging_directory(pathlib.Path({str(tmp_path)!r}), needed=1) as directory:\n"
        "    (directory / 'half').write_bytes(bytes(1000))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )

    def lose_a_worker(_: NewPrefix) -> None:
        assert subprocess.run([sys.executable, "-c", worker], check=False).returncode == -9  # noqa: S603 - our own words
        assert list(tmp_path.rglob("half"))
        raise Killed

    with pytest.raises(Killed):
        write(lose_a_worker)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""


def test_where_clearing_up_fails_too_the_next_attempt_does_it(
    store: Store, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    """The first error is the one that is told; the marker stays to the last."""

    def fail(call: Call) -> None:
        if call.operation in {"upload", "remove"}:
            raise OSError(errno.ECONNRESET, f"{call.operation} reset by peer")

    store.trouble = staticmethod(fail)
    with pytest.raises(CheckpointError, match="upload reset by peer"):
        write()
    assert "the next attempt will do it" in caplog.text
    assert MARKER in store.files()
    store.trouble = staticmethod(lambda _: None)
    write()
    assert store.files() == EXPECTED


def test_of_a_complete_checkpoint_the_visible_files_are_removed_first(
    store: Store, write: Write
) -> None:
    """A removal that is killed leaves nothing that looks complete."""
    store.fill(EXPECTED | {MARKER: b"{}"})
    write()
    removed = [call.path.lstrip("/") for call in store.calls if call.operation == "remove"]
    assert set(removed[:2]) == VISIBLE
    assert removed[len(EXPECTED)] == MARKER


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_there_stays(store: Store, write: Write, *, overwrite: bool) -> None:
    """With --overwrite too, whose promise cannot be kept here; the error says so."""
    store.fill({"bucket/model/theirs": b"theirs"})
    with pytest.raises(TargetExistsError, match="already exists") as caught:
        write(overwrite=overwrite)
    assert store.files() == {"bucket/model/theirs": b"theirs"}
    assert ("--overwrite cannot" in caught.value.message) is overwrite
    assert "cannot swap" in str(caught.value.hint)


def test_a_target_that_is_a_file_is_refused(store: Store, write: Write) -> None:
    """Not written below."""
    store.fill({"bucket/model": b"theirs"})
    with pytest.raises(TargetExistsError, match="is a file"):
        write()
    assert store.files() == {"bucket/model": b"theirs"}


def test_a_neighbour_whose_name_begins_alike_is_not_touched(store: Store, write: Write) -> None:
    """`model-2` is not below `model`."""
    other = {"bucket/model-2/tracker": b"1", "bucket/model.txt": b"x"}
    store.fill(other | {MARKER: b"{}", "bucket/model/half": b"x"})
    write()
    assert store.files() == EXPECTED | other


def test_a_new_repository_of_the_hub_is_empty(store: Store, write: Write) -> None:
    """It has one file from the start, which stays."""
    theirs = {"bucket/model/.gitattributes": b"*"}
    store.fill(theirs)
    with pytest.raises(Killed):
        write(lambda _: (_ for _ in ()).throw(Killed))
    assert store.files() == theirs
    write()
    assert store.files() == EXPECTED | theirs


def test_a_target_that_a_living_process_writes_is_refused(store: Store, write: Write) -> None:
    """One of this machine; of another machine's nobody can tell whether it lives."""
    held = {"claim": "theirs", "host": socket.gethostname(), "pid": os.getppid()}
    files = {MARKER: json.dumps(held).encode(), "bucket/model/half": b"x"}
    store.fill(files)
    with pytest.raises(TargetExistsError, match=f"process {os.getppid()} on this machine"):
        write()
    assert store.files() == files
    markers: list[Any] = [{**held, "host": "elsewhere"}, {**held, "pid": 2**22 + 1}, [], "damaged"]
    for marker in markers:
        store.fill({MARKER: json.dumps(marker).encode()[:-1] + b"}"} | {"bucket/model/half": b"x"})
        write()
        assert store.files() == EXPECTED


def test_a_target_that_another_took_over_is_left_to_it(store: Store, write: Write) -> None:
    """Nothing is made visible, and nothing of the other's removed."""

    def take_over(_: NewPrefix) -> None:
        store.fill({MARKER: b'{"claim": "theirs"}', "bucket/model/theirs": b"x"})

    with pytest.raises(TargetExistsError, match="another conversion has taken"):
        write(take_over)
    assert store.files() == {MARKER: b'{"claim": "theirs"}', "bucket/model/theirs": b"x"}


def test_an_upload_that_arrives_short_is_an_error(store: Store, write: Write) -> None:
    """By its size, whether or not it is read back."""

    def cut(call: Call) -> None:
        if call.operation == "info" and call.path.endswith("iter/a"):
            store.store["/bucket/model/iter/a"].truncate(7)

    store.trouble = staticmethod(cut)
    with pytest.raises(CheckpointError, match="7 of 37 bytes have arrived") as caught:
        write()
    assert caught.value.where == ("store:///bucket/model/iter/a",)
    assert store.files() == {}


def test_a_full_staging_disk_is_an_error_that_names_the_way_out(
    store: Store, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was uploaded before it goes."""

    def full(descriptor: int, offset: int, size: int) -> None:
        del descriptor, offset
        if size == LAYOUTS[1].size:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        write()
    assert "--staging DIR" in str(caught.value.hint)
    assert any(call.operation == "upload" for call in store.calls)
    assert store.files() == {}


def test_the_largest_file_decides_what_room_is_needed(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one is there at a time."""
    asked: list[int] = []
    true = staging_directory

    def ask(parent: Path | None, *, needed: int) -> Any:  # noqa: ANN401 - as in the original
        asked.append(needed)
        return true(parent, needed=needed)

    monkeypatch.setattr(remote_target, "staging_directory", ask)
    write()
    assert asked == [max(layout.size for layout in LAYOUTS)]


def test_a_stop_during_an_upload_is_no_failure_of_the_backend(
    store: Store, target: RemotePath, tmp_path: Path
) -> None:
    """The caller's own exception comes out as it went in."""

    class StoppedError(Exception):
        pass

    def stop(_: int) -> None:
        raise StoppedError

    (tmp_path / "file").write_bytes(bytes(100))
    with pytest.raises(StoppedError):
        remote_target.upload(tmp_path / "file", target / "file", advance=stop)
    del store


def test_a_worker_without_files_asks_for_nothing(
    store: Store, target: RemotePath, array_source: Callable[..., Any]
) -> None:
    """It touches neither the disk nor the store."""
    NewPrefix(target, Path("/nowhere"), LAST).write_files(
        [], array_source({}), {}, limits=LIMITS, advance=print
    )
    assert store.calls == []
