"""Which directory of a checkpoint is read: what its tracker says, or what is named itself."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from bridge.errors import CheckpointError, CorruptFileError
from bridge.storage.torch_dist_iteration import open_checkpoint, open_reader


def iteration_in(directory: Path) -> Path:
    """What Megatron-Core leaves in the directory of iteration 3, of one small tensor."""
    save({"w": torch.zeros(2)}, storage_writer=FileSystemWriter(directory), no_dist=True)
    (directory / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    torch.save({"iteration": 3}, directory / "common.pt")
    return directory


@pytest.mark.parametrize(
    ("text", "name", "iteration"),
    [
        ("0", "iter_0000000", 0),
        ("12\n", "iter_0000012", 12),
        ("12345678", "iter_12345678", 12345678),
        ("release", "release", 0),
    ],
)
def test_the_tracker_names_the_iteration(
    text: str, name: str, iteration: int, tmp_path: Path
) -> None:
    """From the root, and from the iteration's own directory, the answer is the same."""
    directory = iteration_in(tmp_path / name)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    assert (directory, iteration) == open_checkpoint(tmp_path)
    assert (directory, iteration) == open_checkpoint(directory)


def test_a_renamed_iteration_is_known_by_its_common_state(tmp_path: Path) -> None:
    """`common.pt` says which iteration it is when the name does not."""
    directory = iteration_in(tmp_path / "best")
    assert (directory, 3) == open_checkpoint(directory)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (None, CheckpointError, "missing"),
        ("4", CorruptFileError, "iter_0000004, which is missing"),
        ("latest", CorruptFileError, "neither an iteration"),
        ("", CorruptFileError, "neither an iteration"),
        ("../../x", CorruptFileError, "neither an iteration"),
        ("-1", CorruptFileError, "neither an iteration"),
    ],
)
def test_a_tracker_that_does_not_say_is_an_error_that_lists_what_is_there(
    text: str | None, kind: type[CheckpointError], message: str, tmp_path: Path
) -> None:
    """The hint names the iterations that could be loaded."""
    iteration_in(tmp_path / "iter_0000001")
    if text is not None:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(kind, match=message) as caught:
        open_checkpoint(tmp_path)
    assert type(caught.value) is kind
    assert "iter_0000001" in str(caught.value)


def test_no_directory_is_an_error(tmp_path: Path) -> None:
    """A mistyped path."""
    with pytest.raises(CheckpointError, match="no such directory"):
        open_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("method", "name"),
    [("iterdir", ""), ("is_file", "iter_0000003"), ("iterdir", "iter_0000003"),
     ("is_file", "mp_rank_00")],
)  # fmt: skip
def test_a_place_that_may_not_be_read_is_named(
    method: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the root, of an iteration and of one rank; tests run as root may read everything."""
    if name == "mp_rank_00":
        (tmp_path / "iter_0000003" / name).mkdir(parents=True)
    else:
        iteration_in(tmp_path / "iter_0000003")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    place = next(path for path in (tmp_path, *tmp_path.rglob("*")) if path.name.endswith(name))
    usual = getattr(Path, method)

    def refuse(path: Path) -> object:
        if path.is_relative_to(place):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return usual(path)

    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(CheckpointError) as caught:
        open_reader(open_checkpoint(tmp_path)[0], ignore=lambda _: False)
    assert caught.value.message == "cannot read it: Permission denied"
    assert Path(caught.value.where[0]).is_relative_to(place)
