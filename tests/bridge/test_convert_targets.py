"""What a conversion does to what is at its target: nothing, unless it may, and then as a whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.conversion import ConversionOptions
from bridge.convert import export_checkpoint, import_checkpoint
from bridge.errors import CorruptFileError, TargetExistsError, UsageError
from bridge.record import SIDE_DIRECTORY
from bridge.transfer import TransferLimits
from tests.directories import files_of


def test_an_existing_target_is_kept_unless_overwriting_is_asked_for(
    super_checkpoint: Path, tmp_path: Path
) -> None:
    """Nothing of an existing directory is touched; --overwrite replaces it whole."""
    target = tmp_path / "megatron"
    target.mkdir()
    (target / "precious").write_text("mine")
    with pytest.raises(TargetExistsError):
        import_checkpoint(super_checkpoint, target)
    overwriting = ConversionOptions(overwrite=True)
    with pytest.raises(TargetExistsError, match="no checkpoint"):
        import_checkpoint(super_checkpoint, target, options=overwriting)
    assert [path.name for path in target.iterdir()] == ["precious"]
    (target / "config.json").touch()
    import_checkpoint(super_checkpoint, target, options=overwriting)
    assert not (target / "precious").exists()
    assert (target / "latest_checkpointed_iteration.txt").read_text() == "0"


def test_a_failed_overwrite_keeps_the_old_target(super_checkpoint: Path, tmp_path: Path) -> None:
    """A source that turns out damaged half way does not cost the checkpoint that was there."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    before = files_of(tmp_path / "megatron")
    shard = next(super_checkpoint.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(CorruptFileError):
        import_checkpoint(
            super_checkpoint, tmp_path / "megatron", options=ConversionOptions(overwrite=True)
        )
    assert before == files_of(tmp_path / "megatron")
    assert {"hf", "megatron"} == {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("moment", [0.0, 0.02, 0.05, 0.1])
def test_a_killed_conversion_leaves_no_target(
    super_checkpoint: Path, tmp_path: Path, moment: float
) -> None:
    """SIGKILL at some instant: the target is absent or complete, and the next attempt succeeds."""
    target = tmp_path / "out" / "megatron"
    code = (
        "import sys; from pathlib import Path; from bridge.convert import import_checkpoint;"
        "print('ready', flush=True);"
        "import_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    child = subprocess.Popen(  # noqa: S603 (our own interpreter)
        [sys.executable, "-c", code, str(super_checkpoint), str(target)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(moment)
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=60)
    child.stdout.close()
    if target.exists():
        export_checkpoint(target, tmp_path / "early")
    import_checkpoint(super_checkpoint, target, options=ConversionOptions(overwrite=True))
    assert [path.name for path in target.parent.iterdir()] == ["megatron"]
    export_checkpoint(target, tmp_path / "back")
    assert files_of(super_checkpoint) == files_of(tmp_path / "back")


@pytest.mark.parametrize(
    "place",
    [
        lambda hf: hf,
        lambda hf: hf.parent,
        lambda hf: hf / "megatron",
        lambda hf: hf / "config.json",
        lambda hf: hf.parent / "link",
    ],
    ids=["itself", "its parent", "inside it", "a file of it", "a link to it"],
)
def test_a_target_that_would_cost_the_source_is_refused(
    super_checkpoint: Path, tmp_path: Path, place: Callable[[Path], Path]
) -> None:
    """Even with --overwrite: source and target are never one inside the other."""
    (tmp_path / "link").symlink_to(super_checkpoint)
    before = files_of(super_checkpoint)
    with pytest.raises(UsageError):
        import_checkpoint(
            super_checkpoint, place(super_checkpoint), options=ConversionOptions(overwrite=True)
        )
    assert before == files_of(super_checkpoint)


@pytest.mark.parametrize("inner", [".", SIDE_DIRECTORY])
def test_an_export_into_the_checkpoint_itself_is_refused(
    super_checkpoint: Path, tmp_path: Path, inner: str
) -> None:
    """Nor does an export replace what it reads, or the configuration it takes."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    before = files_of(tmp_path / "megatron")
    options = ConversionOptions(overwrite=True)
    with pytest.raises(UsageError):
        export_checkpoint(tmp_path / "megatron", tmp_path / "megatron" / inner, options=options)
    with pytest.raises(UsageError):
        export_checkpoint(
            tmp_path / "megatron", super_checkpoint, hf_model=super_checkpoint, options=options
        )
    assert before == files_of(tmp_path / "megatron")


def test_a_file_is_no_target(super_checkpoint: Path, tmp_path: Path) -> None:
    """A regular file is not turned into a directory."""
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(TargetExistsError):
        import_checkpoint(
            super_checkpoint, tmp_path / "note.txt", options=ConversionOptions(overwrite=True)
        )
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_overwriting_through_a_link_keeps_the_link(super_checkpoint: Path, tmp_path: Path) -> None:
    """What the link points to is replaced; nothing is left behind."""
    import_checkpoint(super_checkpoint, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    import_checkpoint(
        super_checkpoint, tmp_path / "link", options=ConversionOptions(overwrite=True)
    )
    assert (tmp_path / "link").is_symlink()
    assert {"hf", "real", "link"} == {path.name for path in tmp_path.iterdir()}


def test_a_kill_between_the_two_renames_of_an_overwrite_loses_nothing(
    super_checkpoint: Path, tmp_path: Path
) -> None:
    """The old target, moved aside by a process that is gone, is put back by the next attempt."""
    import_checkpoint(super_checkpoint, tmp_path / "megatron")
    before = files_of(tmp_path / "megatron")
    site = tmp_path / ".megatron.partial"
    (site / "data").mkdir(parents=True)
    (site / "lock").touch()
    (tmp_path / "megatron").rename(site / "old")
    with pytest.raises(TargetExistsError):
        import_checkpoint(super_checkpoint, tmp_path / "megatron")
    assert before == files_of(tmp_path / "megatron")
    import_checkpoint(
        super_checkpoint, tmp_path / "megatron", options=ConversionOptions(overwrite=True)
    )
    assert {"hf", "megatron"} == {path.name for path in tmp_path.iterdir()}


def test_a_synthetic_checkpoint_does_not_replace_its_own_configuration(
    super_checkpoint: Path,
) -> None:
    """--overwrite onto the directory the configuration is read from is refused."""
    from bridge.storage.synthetic import synthesize

    before = files_of(super_checkpoint)
    with pytest.raises(UsageError):
        synthesize(
            super_checkpoint / "config.json",
            super_checkpoint,
            seed=0,
            max_shard_size=10**9,
            limits=TransferLimits(),
            overwrite=True,
        )
    assert before == files_of(super_checkpoint)


def test_links_into_the_target_are_no_source_to_overwrite_it_from(
    super_checkpoint: Path, tmp_path: Path
) -> None:
    """The only copy of the weights would go with the old target."""
    (tmp_path / "linked").mkdir()
    for path in super_checkpoint.iterdir():
        (tmp_path / "linked" / path.name).symlink_to(path)
    before = files_of(super_checkpoint)
    with pytest.raises(UsageError, match="one inside the other"):
        import_checkpoint(
            tmp_path / "linked",
            super_checkpoint,
            options=ConversionOptions(overwrite=True, follow_links=True),
        )
    assert before == files_of(super_checkpoint)
