"""The layer sees every call that counts, and does to the right one what it should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.torture.calls import Layer
from harness.torture.faults import parse_fault

WORK = """
import json, os, shutil, sys
from pathlib import Path

from harness.torture.calls import Layer
from harness.torture.faults import parse_fault

place, source, fault = sys.argv[1:4]

def say():
    seen = {"counts": layer.counts, "events": layer.events, "struck": layer.struck}
    os.write(1, json.dumps(seen).encode())

layer = Layer(place, [source], parse_fault(fault) if fault else None, say)
layer.install()
place, source = Path(place), Path(source)
try:
    (place / "a").mkdir()
    (place / "a" / "text").write_text("abcdefgh")
    with (place / "a" / "bytes").open("wb") as stream:
        stream.write(b"12345678")
        stream.flush()
        os.fsync(stream.fileno())
    descriptor = os.open(place / "raw", os.O_RDWR | os.O_CREAT)
    os.pwrite(descriptor, b"x" * 8, 4)
    os.close(descriptor)
    (source / "input").read_bytes()
    Path(source.parent, "elsewhere").write_text("not counted")
    (place / "raw").rename(place / "cooked")
    shutil.rmtree(place / "a")
except OSError as error:
    sys.stderr.write(f"{error.errno} {error.filename}")
layer.rest()
say()
"""


class Done:
    """What the work above came to."""

    def __init__(self, directory: Path, fault: str = "") -> None:
        self.place, source = directory / "place", directory / "source"
        for one in (self.place, source):
            one.mkdir()
        (source / "input").write_bytes(b"input")
        ran = subprocess.run(  # noqa: S603 - ours
            [sys.executable, "-c", WORK, str(self.place), str(source), fault],
            capture_output=True,
            check=False,
            timeout=60,
        )
        self.code, self.err = ran.returncode, ran.stderr.decode()
        self.seen: dict[str, Any] = json.loads(ran.stdout)

    def events(self, kind: str) -> list[str]:
        """`mkdir a`, in their order."""
        return [
            f"{name} {os.path.relpath(path, self.place)}"
            for one, name, path in self.seen["events"]
            if one == kind
        ]

    def left(self) -> dict[str, bytes]:
        """Files by name."""
        paths = [path for path in self.place.rglob("*") if path.is_file()]
        return {path.relative_to(self.place).as_posix(): path.read_bytes() for path in paths}


def test_every_change_is_seen_whichever_way_it_is_made(tmp_path: Path) -> None:
    """By `os`, pathlib, `open` and shutil; what is elsewhere is not."""
    done = Done(tmp_path)
    assert done.code == 0, done.err
    assert done.events("w") == [
        "mkdir a", "create a/text", "write a/text", "create a/bytes", "write a/bytes",
        "fsync a/bytes", "create raw", "pwrite raw", "rename raw",
        *sorted(["unlink a/text", "unlink a/bytes"], key=done.events("w").index), "rmdir a",
    ]  # fmt: skip
    assert "open ../source/input" in done.events("r")
    assert "read ../source/input" in done.events("r")
    assert done.left() == {"cooked": bytes(4) + b"x" * 8}


@pytest.mark.parametrize(
    ("fault", "left"),
    [
        ("w3-before", {"a/text": b""}),
        ("w3-half", {"a/text": b"abcd"}),
        ("w3-after", {"a/text": b"abcdefgh"}),
        ("w3-power", {"a/text": b""}),
        ("write.2-half", {"a/text": b"abcdefgh", "a/bytes": b"1234"}),
        ("w8-half", {"a/text": b"abcdefgh", "a/bytes": b"12345678", "raw": bytes(4) + b"xxxx"}),
        ("w8-power", {"a/text": b"", "a/bytes": b"12345678", "raw": b""}),
        ("w9-power", {"a/text": b"", "a/bytes": b"12345678", "cooked": b""}),
    ],
)
def test_a_kill_strikes_at_its_call(tmp_path: Path, fault: str, left: dict[str, bytes]) -> None:
    """Before, in the middle, after; and a loss of power takes what was not flushed."""
    done = Done(tmp_path, fault)
    assert done.code == -signal.SIGKILL
    assert done.left() == left
    assert done.seen["struck"]


def test_an_error_is_met_once_or_from_then_on(tmp_path: Path) -> None:
    """By the call that can meet it: no mkdir counts as a write of bytes."""
    (tmp_path / "once").mkdir()
    once = Done(tmp_path / "once", "w2-EIO")
    assert once.err == f"5 {once.place / 'a' / 'text'}"
    (tmp_path / "read").mkdir()
    read = Done(tmp_path / "read", "r1-ESTALE")
    assert read.seen["struck"]
    (tmp_path / "lasting").mkdir()
    lasting = Done(tmp_path / "lasting", "w5-ENOSPC!")
    assert lasting.err.startswith("28 ")
    assert lasting.left()["a/bytes"] == b""


def test_the_layer_does_nothing_until_it_is_put_in_place(tmp_path: Path) -> None:
    """A test that makes one does not change this process."""
    before = os.pwrite
    layer = Layer(str(tmp_path), [], parse_fault("w1-before"), lambda: None)
    (tmp_path / "file").write_text("x")
    assert os.pwrite is before
    assert layer.counts == {"w": 0, "r": 0}
