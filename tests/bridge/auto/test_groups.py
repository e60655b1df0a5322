"""Whom a process joins, by its environment, and what it changes of Megatron-Core for a CPU."""

from __future__ import annotations

import atexit

import pytest
import torch

from bridge import platform
from bridge.auto import groups
from bridge.crew.protocol import Alone
from bridge.errors import UsageError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without any of torchrun's variables."""
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("variables", ["", "RANK=0 WORLD_SIZE=1", "WORLD_SIZE=2"])
def test_one_rank_is_a_group_of_one(environment: pytest.MonkeyPatch, variables: str) -> None:
    """With nobody to meet, and so without an address."""
    for one in variables.split():
        environment.setenv(*one.split("="))
    joined: list[tuple[int, int]] = []
    environment.setattr(platform, "join", lambda *ranks, **_: joined.append(ranks))
    environment.setattr(atexit, "register", lambda _: None)
    assert isinstance(groups.crew_here(), Alone)
    groups.join("cpu")
    assert joined == [(0, 1)]


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ("RANK=0 WORLD_SIZE=x", "WORLD_SIZE=x"),
        ("RANK=-1 WORLD_SIZE=2", "RANK=-1"),
        ("RANK=2 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "RANK=2 of WORLD_SIZE=2"),
        ("RANK=0 WORLD_SIZE=2 MASTER_PORT=1", "no MASTER_ADDR"),
    ],
)
def test_an_environment_that_torchrun_does_not_make_is_refused(
    environment: pytest.MonkeyPatch, variables: str, place: str
) -> None:
    """Before anybody waits for anybody."""
    for one in variables.split():
        environment.setenv(*one.split("="))
    for function in (groups.crew_here, lambda: groups.join("cpu")):
        with pytest.raises(UsageError, match="not that of one of torchrun's ranks") as caught:
            function()
        assert caught.value.where == (place,)
    assert not torch.distributed.is_initialized()


def test_schedules_are_left_as_they_are_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replacement outlives the model; it does nothing where tensors can be on a GPU."""
    asked: list[object] = []
    monkeypatch.setattr(torch, "zeros", lambda *_, **kwargs: asked.append(kwargs["device"]))
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        groups._OnCpu().zeros(1, device="cuda")
    assert asked == ["cuda", "cpu"]
