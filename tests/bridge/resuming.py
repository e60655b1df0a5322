"""Conversions that are cut short and gone on with, for the tests of both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.conversion import ConversionOptions
from bridge.convert import import_checkpoint
from bridge.errors import (
    CheckpointError,
)
from bridge.transfer import TransferLimits

Failing = Callable[[int], None]
"""Lets the disk be full after so many files; zero heals it."""
DONE_ALREADY = (
    "nothing to do: the target was complete, and has the hashes of its manifest, like its source"
)
ONE_AT_A_TIME = TransferLimits(threads=1)
RESUME = ConversionOptions(resume=True, limits=ONE_AT_A_TIME)


def everything(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, the manifest too."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def cut_short(source: Path, target: Path, failing: Failing, **how: int) -> Path:
    """An import whose third file found no room; its site."""
    failing(2)
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        import_checkpoint(
            source,
            target,
            tensor_model_parallel_size=how.get("tp", 2),
            pipeline_model_parallel_size=2,
            options=ConversionOptions(limits=ONE_AT_A_TIME),
        )
    failing(0)
    site = target.parent / f".{target.name}.partial"
    assert f"--resume goes on with what is complete; to give it up, remove {site}" in str(
        caught.value
    )
    assert not target.exists()
    return site


def identities(directory: Path) -> set[tuple[int, int]]:
    """Of the weight files below a directory: one that is written again has another time."""
    found = (path.stat() for path in directory.rglob("*.distcp"))
    return {(status.st_ino, status.st_mtime_ns) for status in found}


def clean(source: Path, target: Path) -> dict[str, bytes]:
    """What an import that nothing befalls makes."""
    import_checkpoint(source, target, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    return everything(target)


def resume(source: Path, target: Path, options: ConversionOptions = RESUME) -> None:
    """The same command again."""
    import_checkpoint(
        source,
        target,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        options=options,
    )
