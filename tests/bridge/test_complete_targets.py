"""A target that was complete already is nothing to do, unless it or its source is another now."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from bridge.conversion import ConversionOptions
from bridge.convert import export_checkpoint, import_checkpoint
from bridge.errors import (
    CheckpointError,
    ResumeError,
    TargetExistsError,
    VerificationError,
)
from bridge.manifest import read_manifest
from bridge.record import sha256_of
from bridge.storage import building, new_files
from bridge.storage.remote import parse_location
from bridge.storage.synthetic import synthesize
from bridge.storage.target import MANIFEST_NAME
from tests.bridge.resuming import (
    DONE_ALREADY,
    ONE_AT_A_TIME,
    RESUME,
    Failing,
    clean,
    everything,
    identities,
    resume,
)

Store: TypeAlias = Any


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
