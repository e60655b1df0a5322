"""Ranks' files that are not of one save: nothing but what they say of themselves can tell."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.errors import CheckpointError, CorruptFileError
from bridge.storage.torch_legacy import TorchLegacyReader
from bridge.storage.torch_legacy_ranks import (
    args_of,
    rank_directories,
    refuse_missing_ranks,
    refuse_unlike_ranks,
)


def state(**changed: Any) -> dict[str, Any]:  # noqa: ANN401 - a pickle's
    """What a rank says of itself."""
    args = Namespace(num_layers=4, rotary_base=10_000, rank=changed.pop("rank", 0))
    return {"iteration": 3, "checkpoint_version": 3.0, "args": args} | changed


def test_ranks_of_one_save_may_differ_in_what_is_their_own() -> None:
    """`args.rank` names the rank; it says nothing of the model."""
    refuse_unlike_ranks({"a": state(), "b": state(rank=1)})


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        ({"iteration": 4}, "b: iteration is 4, in a 3"),
        ({"checkpoint_version": 2.0}, "b: checkpoint_version is 2.0, in a 3.0"),
        (
            {"args": {"num_layers": 4, "rotary_base": 1}},
            "b: args.rotary_base is 1, in a 10000",
        ),
    ],
)
def test_ranks_of_several_saves_are_named(changed: dict[str, Any], place: str) -> None:
    """Iteration, version and architecture are the same on all ranks of a run."""
    with pytest.raises(CorruptFileError, match="not of one save") as caught:
        refuse_unlike_ranks({"a": state(), "b": state(**changed)})
    assert caught.value.where == (place,)


def test_two_directories_of_one_rank_are_refused(tmp_path: Path) -> None:
    """A run without pipeline parallelism left one, a run with it the other."""
    for name in ("mp_rank_00", "mp_rank_00_000"):
        (tmp_path / name).mkdir()
    with pytest.raises(CorruptFileError, match="two directories") as caught:
        rank_directories(tmp_path)
    assert [Path(place).name for place in caught.value.where] == ["mp_rank_00", "mp_rank_00_000"]


def test_a_last_rank_that_is_missing_is_told_by_the_args(tmp_path: Path) -> None:
    """The directories alone look like a smaller run; ranks of a bigger one are leftovers."""
    ranks = {(tp, pp): "" for tp in range(2) for pp in range(2)}
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 3}
    with pytest.raises(CheckpointError, match="2 of 2 x 3 ranks are missing"):
        refuse_missing_ranks(ranks, tmp_path, sizes)
    with pytest.raises(CorruptFileError, match="the args say 2 x 1"):
        refuse_missing_ranks(ranks, tmp_path, sizes | {"pipeline_model_parallel_size": 1})
    refuse_missing_ranks(ranks, tmp_path, {"tensor_model_parallel_size": True})


def test_a_stray_directory_of_a_rank_beyond_all_runs_is_named(tmp_path: Path) -> None:
    """At once: nothing is listed up to its number."""
    for name in ("mp_rank_00_000", "mp_rank_99999999999_000"):
        (tmp_path / name).mkdir()
    with pytest.raises(CorruptFileError, match="no run has more than 1024") as caught:
        TorchLegacyReader(tmp_path)
    assert caught.value.where == (str(tmp_path / "mp_rank_99999999999_000"),)


def test_of_many_missing_ranks_the_first_are_named(tmp_path: Path) -> None:
    """The last rank of the largest run alone lacks over a million others."""
    with pytest.raises(CheckpointError, match="1048575 of 1024 x 1024 ranks") as caught:
        refuse_missing_ranks({(1023, 1023): ""}, tmp_path)
    assert caught.value.where[0].endswith("mp_rank_00_000")
    assert caught.value.where[-1] == "and 1048559 more"
    assert len(caught.value.where) == 17


def test_args_of_any_other_kind_are_no_args() -> None:
    """A mapping is as good as a Namespace."""
    assert args_of({"args": {"a": 1}}, where="f") == {"a": 1}
    assert args_of({}, where="f") is None
    with pytest.raises(CorruptFileError, match="args is str"):
        args_of({"args": "x"}, where="f")


def test_a_file_from_before_zip_archives_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    """It can be saved again; a damaged one has to be fetched again."""
    (tmp_path / "mp_rank_00").mkdir()
    path = tmp_path / "mp_rank_00" / "model_optim_rng.pt"
    torch.save({"model": {}}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="before PyTorch") as caught:
        TorchLegacyReader(tmp_path)
    assert "torch.save(torch.load(" in str(caught.value.hint)
