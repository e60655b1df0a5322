"""What is told of a source: each byte is some tensor's once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bridge.dtypes import dtype_named
from bridge.errors import CorruptFileError
from bridge.manifest import FileEntry
from bridge.read_side import ReadSide, SourceWatch, megatron_side
from bridge.storage.extents import Extent
from bridge.storage.journal import Job, fingerprint
from bridge.storage.remote import RemotePath, parse_location
from bridge.storage.source import TensorInfo
from bridge.tiling import Box

Runs = Mapping[str, list[tuple[str, int]] | None]


def source_of(root: Path, runs: Runs, *, ignored: tuple[str, ...] = ()) -> Any:  # noqa: ANN401
    """A checkpoint of tensors of 8 bytes, each in runs of so many bytes' offset of files."""
    directory = root / "iter_0000000"
    directory.mkdir()
    for file in {file for one in runs.values() for file, _ in one or ()}:
        (directory / file).write_bytes(bytes(64))

    def extents(name: str, _: Box) -> list[Extent] | None:
        found = runs[name]
        if found is None:
            return None
        return [Extent(directory / file, at, 8 // len(found)) for file, at in found]

    info = TensorInfo(shape=(4,), dtype=dtype_named("bfloat16"))
    return SimpleNamespace(
        root=root,
        directory=directory,
        ignored=ignored,
        tensors=dict.fromkeys(runs, info),
        extents=extents,
    )


def test_a_tensor_that_lies_whole_is_hashed_with_its_file(tmp_path: Path) -> None:
    """One in pieces, one that is no run of bytes, and one that shares bytes, by themselves."""
    runs: Runs = {
        "late": [("a", 40)],
        "early": [("a", 8)],
        "overlaps early": [("a", 12)],
        "the same as late": [("a", 40)],
        "in pieces": [("a", 20), ("b", 0)],
        "in columns": None,
        "elsewhere": [("b", 16)],
    }
    side = megatron_side(source_of(tmp_path, runs))
    parts = {
        name: [(part.tensor, part.offset, part.nbytes) for part in found]
        for name, found in side.within.items()
    }
    assert side.files.keys() == parts.keys()
    assert parts == {
        "iter_0000000/a": [("early", 8, 8), ("late", 40, 8)],
        "iter_0000000/b": [("elsewhere", 16, 8)],
    }
    assert side.tensors == ["overlaps early", "the same as late", "in pieces", "in columns"]


@pytest.mark.parametrize("ignored", [(), ("optimizer.*",)])
def test_files_that_hold_an_optimizer_are_watched_and_not_read(
    tmp_path: Path, ignored: tuple[str, ...]
) -> None:
    """Their tensors are hashed by themselves."""
    side = megatron_side(source_of(tmp_path, {"one": [("a", 8)]}, ignored=ignored))
    assert side.names == ["iter_0000000/a"]
    assert bool(side.files) == (not ignored)
    assert list(side.tensors) == (["one"] if ignored else [])


def test_a_remote_source_is_asked_again_at_the_last_look(
    store: Any,  # noqa: ANN401
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Backends remember listings: an answer of the start says nothing of the end."""
    store.fill({"bucket/hf/config.json": b"{}"})
    root = parse_location("store://bucket/hf")
    asked: list[RemotePath] = []
    monkeypatch.setattr(RemotePath, "forget_listings", lambda path: asked.append(path))  # noqa: PLW0108 - a method
    files = {"config.json": FileEntry(nbytes=2)}
    side = ReadSide(root=root, files=files, source=SimpleNamespace())
    job = Job(what={}, source=fingerprint(root, side.names), sizes={})
    watch = SourceWatch(side=side, job=job)
    watch.refuse_changes()
    assert asked == [root]
    store.fill({"bucket/hf/config.json": b"{ }"})
    with pytest.raises(CorruptFileError, match="changed while it was converted") as caught:
        watch.refuse_changes()
    assert caught.value.where[0].startswith("config.json:")
