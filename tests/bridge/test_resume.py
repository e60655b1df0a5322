"""A conversion that was cut short is gone on with, to the same bytes, or refused with a reason."""

from __future__ import annotations

import errno
import os
import shutil
import traceback
from concurrent.futures import wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from bridge.conversion import ConversionOptions
from bridge.conversion_job import ConversionJob
from bridge.convert import export_checkpoint, import_checkpoint
from bridge.errors import (
    CheckpointError,
    CorruptFileError,
    ResumeError,
    UsageError,
)
from bridge.storage import building, new_files
from bridge.storage.remote import parse_location
from bridge.storage.synthetic import synthesize
from bridge.storage.target import MANIFEST_NAME
from tests.bridge.resuming import (
    ONE_AT_A_TIME,
    RESUME,
    Failing,
    clean,
    cut_short,
    everything,
    identities,
    resume,
)

Store: TypeAlias = Any


def test_what_is_complete_is_kept_and_the_result_is_the_same(
    super_checkpoint: Path, tmp_path: Path, failing: Failing
) -> None:
    """The files of the first attempt are those of the result, by their inodes."""
    expected = clean(super_checkpoint, tmp_path / "clean")
    site = cut_short(super_checkpoint, tmp_path / "megatron", failing)
    kept = identities(site / "data")
    resume(super_checkpoint, tmp_path / "megatron")
    assert everything(tmp_path / "megatron") == expected
    now = identities(tmp_path / "megatron")
    assert len(now & kept) >= 2  # the fourth may have been complete when the third failed
    assert len(now - kept) >= 1
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "clean", "megatron"}


@pytest.mark.parametrize("spoil", ["touched", "cut", "gone", "note cut short", "a stranger's"])
def test_what_cannot_be_trusted_is_written_again(
    super_checkpoint: Path, tmp_path: Path, failing: Failing, spoil: str
) -> None:
    """Even without the comparison that would find it in the end."""
    expected = clean(super_checkpoint, tmp_path / "clean")
    site = cut_short(super_checkpoint, tmp_path / "megatron", failing)
    first = min((site / "data").rglob("*.distcp"))
    (notes,) = site.glob("done-*")
    match spoil:
        case "touched":
            first.write_bytes(bytes(first.stat().st_size))
        case "cut":
            first.write_bytes(first.read_bytes()[:-1])
        case "gone":
            first.unlink()
        case "note cut short":
            notes.write_bytes(notes.read_bytes()[:-9])
        case _:
            (site / "data" / "iter_0000000" / "__9_9.distcp").touch()
    resume(
        super_checkpoint,
        tmp_path / "megatron",
        ConversionOptions(resume=True, verify="none", limits=ONE_AT_A_TIME),
    )
    names = {name for name in expected if name.endswith(".distcp")}
    found = everything(tmp_path / "megatron")
    assert {name: found[name] for name in found if name.endswith(".distcp")} == {
        name: expected[name] for name in names
    }


def test_without_the_flag_it_starts_over(
    super_checkpoint: Path, tmp_path: Path, failing: Failing
) -> None:
    """And nothing of the first attempt is left."""
    site = cut_short(super_checkpoint, tmp_path / "megatron", failing)
    kept = identities(site / "data")
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    assert not kept & identities(tmp_path / "megatron")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "megatron"}


def test_a_changed_source_is_noticed(
    super_checkpoint: Path, tmp_path: Path, failing: Failing
) -> None:
    """By name; what was built stays until somebody decides."""
    site = cut_short(super_checkpoint, tmp_path / "megatron", failing)
    shard = sorted(super_checkpoint.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    before = everything(site / "data")
    with pytest.raises(ResumeError, match="the source has changed") as caught:
        resume(super_checkpoint, tmp_path / "megatron")
    assert [place.partition(":")[0] for place in caught.value.where] == [shard.name]
    assert everything(site / "data") == before
    assert not (tmp_path / "megatron").exists()


def test_another_conversion_is_not_gone_on_with(
    super_checkpoint: Path, tmp_path: Path, failing: Failing
) -> None:
    """Files cut for other ranks would not fit together."""
    cut_short(super_checkpoint, tmp_path / "megatron", failing)
    with pytest.raises(ResumeError, match="another conversion"):
        import_checkpoint(super_checkpoint, tmp_path / "megatron", options=RESUME)


@pytest.mark.parametrize("kind", [PermissionError, ZeroDivisionError])
def test_a_failure_of_the_last_step_is_one_message(
    super_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: type[Exception],
) -> None:
    """How to go on is in it, in an error of ours and in a crash: nothing is logged beside it."""

    def place(site: building.Site) -> None:
        raise kind(errno.EACCES, os.strerror(errno.EACCES), str(site.target))

    monkeypatch.setattr(building.Site, "place", place)
    with pytest.raises((CheckpointError, kind)) as caught:
        import_checkpoint(super_checkpoint, tmp_path / "megatron")
    kept = f"--resume goes on with what is complete; to give it up, remove {tmp_path}/.megatron.pa"
    said = "".join(traceback.format_exception_only(caught.value))
    assert said.count(kept) == 1
    assert isinstance(caught.value, CheckpointError) == (kind is PermissionError)
    assert caplog.records == []


def test_a_mount_that_vanishes_is_not_built_anew_beneath(
    super_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left there is the empty mount point; back again, it holds what is gone on with."""
    mount, away = tmp_path / "mount", tmp_path / "away"
    mount.mkdir()
    expected = clean(super_checkpoint, tmp_path / "clean")
    create, left = new_files.Flusher.create, [2]

    def vanishing(flusher: new_files.Flusher, *args: Any) -> new_files.NewFile:  # noqa: ANN401
        if left[0] == 0:
            wait(flusher._submitted)  # and noted
            mount.rename(away)
            mount.mkdir()
        left[0] -= 1
        return create(flusher, *args)

    monkeypatch.setattr(new_files.Flusher, "create", vanishing)
    with pytest.raises(CheckpointError, match="No such file or directory") as caught:
        resume(super_checkpoint, mount / "megatron")
    assert caught.value.code == "BR300"
    assert "--resume goes on" in str(caught.value)
    assert list(mount.iterdir()) == []
    monkeypatch.undo()
    mount.rmdir()
    away.rename(mount)
    kept = identities(mount)
    resume(super_checkpoint, mount / "megatron")
    assert everything(mount / "megatron") == expected
    assert len(identities(mount / "megatron") & kept) >= 2


def test_a_source_that_changes_meanwhile_makes_no_target(
    super_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the bytes that were read make a whole: nobody could say of what."""
    from bridge.conversion_job import ConversionJob

    verify = ConversionJob.verify

    def meanwhile(self: ConversionJob, *sides: Any, **what: Any) -> dict[str, str]:  # noqa: ANN401
        os.utime(super_checkpoint / "tokenizer.json", ns=(1, 1))
        return verify(self, *sides, **what)

    monkeypatch.setattr(ConversionJob, "verify", meanwhile)
    with pytest.raises(CorruptFileError, match="changed while it was converted") as caught:
        import_checkpoint(super_checkpoint, tmp_path / "megatron")
    assert caught.value.where[0].startswith("tokenizer.json:")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_read_error_costs_nothing_that_is_complete(
    super_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source's file system was away for a moment: its bytes are not wrong."""
    verify = ConversionJob.verify

    def away(*_: object, **__: object) -> dict[str, str]:
        raise CheckpointError("cannot read at byte 7: Input/output error")

    monkeypatch.setattr(ConversionJob, "verify", away)
    with pytest.raises(CheckpointError, match="--resume goes on"):
        clean(super_checkpoint, tmp_path / "megatron")
    before = identities(tmp_path / ".megatron.partial" / "data")
    monkeypatch.setattr(ConversionJob, "verify", verify)
    resume(super_checkpoint, tmp_path / "megatron")
    assert identities(tmp_path / "megatron") == before


def test_an_export_is_gone_on_with(
    super_checkpoint: Path, tmp_path: Path, failing: Failing
) -> None:
    """Rounded, too: what rounding has cost is told of all weights, not only of the rest."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    rounding = ConversionOptions(dtype="float16", allow_overflow=True, limits=ONE_AT_A_TIME)
    expected = export_checkpoint(tmp_path / "megatron", tmp_path / "clean", options=rounding)
    failing(2)
    with pytest.raises(CheckpointError, match="No space"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "back", options=rounding)
    failing(0)
    found = export_checkpoint(
        tmp_path / "megatron", tmp_path / "back", options=replace(rounding, resume=True)
    )
    assert everything(tmp_path / "back") == everything(tmp_path / "clean")
    assert found.rounding == expected.rounding


def test_a_synthetic_checkpoint_is_gone_on_with(
    super_checkpoint: Path, tmp_path: Path, failing: Failing
) -> None:
    """Of another seed it is not."""

    def make(target: Path, seed: int = 0, *, again: bool = False) -> None:
        synthesize(
            super_checkpoint / "config.json", target,
            seed=seed, max_shard_size=500_000, limits=ONE_AT_A_TIME, resume=again,
        )  # fmt: skip

    make(tmp_path / "clean")
    failing(2)
    with pytest.raises(CheckpointError, match="No space"):
        make(tmp_path / "synthetic")
    failing(0)
    with pytest.raises(ResumeError, match="another conversion"):
        make(tmp_path / "synthetic", seed=1, again=True)
    make(tmp_path / "synthetic", again=True)
    assert everything(tmp_path / "synthetic") == everything(tmp_path / "clean")


def test_a_target_behind_a_url_is_gone_on_with(
    super_checkpoint: Path, tmp_path: Path, store: Store
) -> None:
    """What has arrived whole is not sent again; its size alone proves little."""
    expected = clean(super_checkpoint, tmp_path / "clean")
    make = partial(
        import_checkpoint,
        super_checkpoint,
        parse_location("store://bucket/megatron"),
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
    )
    left: dict[str, bytes] = {}

    def remember(call: Any) -> None:  # noqa: ANN401 - the conftest's Call
        names = {name for name in store.files() if name.endswith(".distcp")}
        if call.operation == "upload" and len(names) == 2 and not left:
            left.update(store.files())

    store.trouble = staticmethod(remember)
    make(options=ConversionOptions(limits=ONE_AT_A_TIME))
    store.clear()
    store.fill(left)  # as a kill before the third upload would have left it
    kept = {name for name in left if name.endswith(".distcp")}
    assert len(kept) == 2
    with pytest.raises(UsageError, match="complete by their size"):
        make(options=ConversionOptions(resume=True, verify="none"))
    store.calls.clear()
    (tmp_path / "nemotron-bridge-staging-killed").mkdir()
    make(options=replace(RESUME, staging=tmp_path))
    assert not (tmp_path / "nemotron-bridge-staging-killed").exists()
    found = {name.partition("/megatron/")[2]: data for name, data in store.files().items()}
    assert found == expected
    sent = {call.path.lstrip("/") for call in store.calls if call.operation == "upload"}
    assert len(sent) == 2
    assert not kept & sent


def test_a_copy_of_the_site_is_no_site(
    super_checkpoint: Path, tmp_path: Path, failing: Failing
) -> None:
    """Its files have other times: they are written again, and the result is right."""
    expected = clean(super_checkpoint, tmp_path / "clean")
    site = cut_short(super_checkpoint, tmp_path / "megatron", failing)
    shutil.copytree(site, tmp_path / "copy", copy_function=shutil.copy)
    shutil.rmtree(site)
    (tmp_path / "copy").rename(site)
    resume(super_checkpoint, tmp_path / "megatron")
    assert everything(tmp_path / "megatron") == expected
    assert (tmp_path / "megatron" / MANIFEST_NAME).is_file()
