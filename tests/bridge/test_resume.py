"""A conversion that was cut short is gone on with, to the same bytes, or refused with a reason."""

from __future__ import annotations

import errno
import os
import shutil
import traceback
from collections.abc import Callable
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
    TargetExistsError,
    UsageError,
    VerificationError,
)
from bridge.manifest import read_manifest
from bridge.record import sha256_of
from bridge.storage import building, new_files
from bridge.storage.remote import parse_location
from bridge.storage.synthetic import synthesize
from bridge.storage.target import MANIFEST_NAME
from bridge.transfer import TransferLimits

Store: TypeAlias = Any
Failing = Callable[[int], None]
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

    seal = ConversionJob.seal

    def meanwhile(self: ConversionJob, *args: object) -> object:
        os.utime(super_checkpoint / "tokenizer.json", ns=(1, 1))
        return seal(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(ConversionJob, "seal", meanwhile)
    with pytest.raises(CorruptFileError, match="changed while it was converted") as caught:
        import_checkpoint(super_checkpoint, tmp_path / "megatron")
    assert caught.value.where[0].startswith("tokenizer.json:")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_complete_target_is_nothing_to_do(super_checkpoint: Path, tmp_path: Path) -> None:
    """A kill after the last step: the loop that tries again ends well."""
    expected = clean(super_checkpoint, tmp_path / "megatron")
    (tmp_path / ".megatron.partial" / "data").mkdir(parents=True)
    (tmp_path / ".megatron.partial" / "lock").touch()
    report = import_checkpoint(
        super_checkpoint,
        tmp_path / "megatron",
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        options=RESUME,
    )
    assert DONE_ALREADY in report.notes
    assert report.verified
    assert everything(tmp_path / "megatron") == expected
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "megatron"}
    with pytest.raises(TargetExistsError):  # of other ranks
        import_checkpoint(super_checkpoint, tmp_path / "megatron", options=RESUME)


def unverified(what: str, source: Path, root: Path, *, seed: int = 0) -> Path:
    """A target that nothing was compared of and that has no manifest; the attempt after a kill."""
    target = root / what
    options = replace(RESUME, verify="none")
    if what == "imported":
        import_checkpoint(source, target, options=options)
    elif what == "exported":
        export_checkpoint(source, target, options=options)
    else:
        synthesize(
            source / "config.json", target,
            seed=seed, max_shard_size=500_000, limits=ONE_AT_A_TIME, resume=True,
        )  # fmt: skip
    return target


@pytest.mark.parametrize("what", ["imported", "exported", "synthesized"])
@pytest.mark.parametrize("left", ["the site", "nothing"])
def test_a_complete_target_without_hashes_is_nothing_to_do(
    super_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, left: str
) -> None:
    """Be it killed right after the last rename, or after the last call: no byte is written."""
    root = tmp_path / "root"
    root.mkdir()
    source = super_checkpoint
    if what == "exported":
        source = tmp_path / "megatron"
        import_checkpoint(super_checkpoint, source)
    if left == "the site":

        def killed(site: building.Site) -> None:
            if site.target.exists():
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(building.Site, "sweep", killed)
            with pytest.raises(KeyboardInterrupt):
                unverified(what, source, root)
        assert (root / f".{what}.partial" / "job.json").exists()
    else:
        unverified(what, source, root)
    before = {path: path.stat().st_mtime_ns for path in (root / what).rglob("*")}
    assert before
    monkeypatch.setattr(new_files.Flusher, "create", None)
    target = unverified(what, source, root)
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before
    assert list(root.iterdir()) == [target]


@pytest.mark.parametrize("changed", ["source", "target", "seed", "no attributes"])
def test_a_complete_target_without_hashes_is_taken_by_its_mark_alone(
    super_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """Of this job, of this source, untouched since, and where a file system keeps it."""
    what = "synthesized" if changed == "seed" else "imported"
    if changed == "no attributes":

        def unsupported(*_: object) -> None:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

        monkeypatch.setattr(os, "setxattr", unsupported)
    target = unverified(what, super_checkpoint, tmp_path)
    touched = {"source": super_checkpoint, "target": target}.get(changed)
    if touched is not None:
        os.utime(next(path for path in touched.rglob("*") if path.is_file()), ns=(1, 1))
    expected = everything(target)
    with pytest.raises(TargetExistsError, match="already exists"):
        unverified(what, super_checkpoint, tmp_path, seed=int(changed == "seed"))
    assert everything(target) == expected


def test_a_complete_target_is_not_taken_on_trust(super_checkpoint: Path, tmp_path: Path) -> None:
    """Neither when it was damaged since, nor when its source has changed."""
    clean(super_checkpoint, tmp_path / "megatron")
    (record,) = (tmp_path / "megatron").glob("iter_*/__0_0.distcp")
    whole = record.read_bytes()
    record.write_bytes(whole[:-1] + b"\xff")
    with pytest.raises(VerificationError, match="damaged since"):
        resume(super_checkpoint, tmp_path / "megatron")
    record.write_bytes(whole)
    config = super_checkpoint / "tokenizer_config.json"
    config.write_bytes(config.read_bytes() + b" ")
    with pytest.raises(ResumeError, match="its source has changed"):
        resume(super_checkpoint, tmp_path / "megatron")


def test_a_file_that_has_come_to_a_complete_target_is_seen(
    super_checkpoint: Path, tmp_path: Path
) -> None:
    """As `verify --manifest` sees it: a loader would take it."""
    clean(super_checkpoint, tmp_path / "megatron")
    (tmp_path / "megatron" / "iter_0000000" / "__9_9.distcp").touch()
    with pytest.raises(VerificationError, match="damaged since") as caught:
        resume(super_checkpoint, tmp_path / "megatron")
    assert caught.value.where == ("iter_0000000/__9_9.distcp: was not there",)


@pytest.mark.parametrize("why", ["source", "target"])
def test_what_was_begun_in_the_place_of_the_same_model_is_gone_on_with(
    super_checkpoint: Path, tmp_path: Path, failing: Failing, why: str
) -> None:
    """The old one is of a source that has changed since, or damaged: why it is overwritten."""
    target = tmp_path / "megatron"
    clean(super_checkpoint, target)
    if why == "source":
        config = super_checkpoint / "tokenizer_config.json"
        config.write_bytes(config.read_bytes() + b" ")
    else:
        (record,) = target.glob("iter_*/__0_0.distcp")
        record.write_bytes(record.read_bytes()[:-1] + b"\xff")
    failing(2)
    over = replace(RESUME, overwrite=True)
    with pytest.raises(CheckpointError, match="No space left on device"):
        resume(super_checkpoint, target, replace(over, resume=False))
    failing(0)
    kept = identities(tmp_path / ".megatron.partial")
    assert kept
    resume(super_checkpoint, target, over)
    assert everything(target) == clean(super_checkpoint, tmp_path / "other")
    assert len(identities(target) & kept) >= 2


@pytest.mark.parametrize("changed", ["dtype", "side file", "padding"])
def test_a_complete_target_of_another_command_or_source_is_not_taken_for_this_one(
    super_checkpoint: Path, tmp_path: Path, changed: str
) -> None:
    """A file that is new beside the weights; a dtype that changes config.json alone; `args`."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    options, multiple = RESUME, 128
    if changed == "dtype":
        options = replace(RESUME, dtype="float32")  # as they are; config.json may say it otherwise
    elif changed == "padding":
        multiple = 640  # 523 rows become 640 by 128, too
    else:
        (super_checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises((ResumeError, TargetExistsError)):
        import_checkpoint(
            super_checkpoint,
            tmp_path / "megatron",
            options=options,
            make_vocab_size_divisible_by=multiple,
        )


def test_an_export_like_another_model_s_directory_notices_its_change(
    super_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complete or begun: its files are in the result."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    shutil.copytree(super_checkpoint, tmp_path / "like")
    export = partial(
        export_checkpoint, tmp_path / "megatron", tmp_path / "hf2", hf_model=tmp_path / "like"
    )
    export()
    export(options=RESUME)
    manifest = read_manifest(tmp_path / "hf2")
    assert manifest is not None
    assert not [name for name in manifest.source if name.startswith("hf_source/")]
    assert manifest.what["--hf-model: config.json"] == sha256_of(
        (tmp_path / "like" / "config.json").read_bytes()
    )
    monkeypatch.chdir(tmp_path / "like")
    export(hf_model=Path(), options=RESUME)  # the same files by another name
    (tmp_path / "like" / "tokenizer_config.json").write_text("{}")
    with pytest.raises((ResumeError, TargetExistsError)):
        export(options=RESUME)


def test_what_another_conversion_has_begun_is_not_swept_by_one_that_is_done(
    super_checkpoint: Path, tmp_path: Path, failing: Failing
) -> None:
    """Its --resume still goes on."""
    expected = clean(super_checkpoint, tmp_path / "megatron")
    failing(1)
    with pytest.raises(CheckpointError, match="No space left on device"):
        import_checkpoint(
            super_checkpoint,
            tmp_path / "megatron",
            tensor_model_parallel_size=1,
            pipeline_model_parallel_size=2,
            options=ConversionOptions(limits=ONE_AT_A_TIME, overwrite=True),
        )
    failing(0)
    site = tmp_path / ".megatron.partial"
    before = sorted(path.name for path in site.rglob("*"))
    resume(super_checkpoint, tmp_path / "megatron")
    assert everything(tmp_path / "megatron") == expected
    assert before == sorted(path.name for path in site.rglob("*"))


def test_a_read_error_costs_nothing_that_is_complete(
    super_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source's file system was away for a moment: its bytes are not wrong."""
    verify = ConversionJob.verify

    def away(*_: object) -> dict[str, str]:
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


def test_a_manifest_without_the_last_files_is_no_complete_target(
    super_checkpoint: Path, tmp_path: Path, store: Store
) -> None:
    """Behind a URL those come after it; a kill between leaves the marker as well."""
    target = parse_location("store://bucket/megatron")
    left: dict[str, bytes] = {}

    def remember(call: Any) -> None:  # noqa: ANN401 - the conftest's Call
        if call.path.endswith("latest_checkpointed_iteration.txt") and call.operation == "write":
            left.update(store.files())

    store.trouble = staticmethod(remember)
    import_checkpoint(super_checkpoint, target)
    whole = store.files()
    store.clear()
    store.fill(left)
    assert any(name.endswith(MANIFEST_NAME) for name in left)
    again = replace(RESUME, staging=tmp_path)
    staged = tmp_path / "nemotron-bridge-staging-killed"
    staged.mkdir()
    import_checkpoint(super_checkpoint, target, options=again)  # with nothing left to build
    assert store.files() == whole
    assert not staged.exists()
    staged.mkdir()
    report = import_checkpoint(super_checkpoint, target, options=again)
    assert DONE_ALREADY in report.notes
    assert not staged.exists()


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
