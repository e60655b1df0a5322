"""Ranks that a command starts: they say what they do, and nobody waits for a dead one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bridge.crew.launch import Launch
from bridge.errors import EnvironmentMissingError, LayoutError, WorkerLostError
from bridge.generation import launch
from bridge.generation.decoding import Step
from bridge.generation.launch import Request, check_world, run
from bridge.generation.sampling import Sampling
from bridge.generation.source import find_model
from bridge.pipeline import parse_layout
from bridge.progress import Silent
from harness.toys import toy_named, write_checkpoint

if TYPE_CHECKING:
    from tests.bridge.generation import generation_ranks as ranks
else:  # a module beside this file: tests are not a package
    sys.path.append(str(Path(__file__).parent))
    import generation_ranks as ranks

pytestmark = [pytest.mark.ranks, pytest.mark.usefixtures("nobody_stays_behind")]

HERE = Launch(workers=1, crew=None)


@pytest.fixture(scope="module")
def request_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Request]:
    """Six tokens of two prompts by a toy under a layout."""
    path = tmp_path_factory.mktemp("toy") / "hf"
    write_checkpoint(toy_named("super-49b-v1"), path, dtype="float32")
    model = find_model(str(path), None)

    def request(layout: str) -> Request:
        return Request(
            model=model,
            layout=parse_layout(layout, model.spec),
            params_dtype="float32",
            device="cpu",
            layers="auto",
            prompts=((1, 2, 3), (4, 5)),
            max_new_tokens=6,
            sampling=Sampling(temperature=1.0, seed=3),
            stop_token_ids=frozenset(),
            batch_size=2,
            timeout=60,
        )

    return request


def test_a_rank_that_is_killed_is_named_and_takes_the_others_along(
    request_of: Callable[[str], Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the other one waits for it inside a collective, and complains of its silence."""
    monkeypatch.setattr(launch, "_serve", ranks.serve_and_die)
    steps: list[Step] = []
    with pytest.raises(WorkerLostError, match="rank 1 of 2 was killed by SIGKILL\n") as caught:
        run(request_of("tp1-pp2"), HERE, progress=Silent(), on_step=steps.append)
    assert len(steps) == 4
    assert "memory ran out" in (caught.value.hint or "")


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("serve", "said"),
    [("serve_and_stop", "has given no sign of life for"), ("serve_and_hang", "has made no")],
)
def test_a_rank_that_stops_or_hangs_is_named_and_not_the_one_that_waits_for_it(
    request_of: Callable[[str], Request], monkeypatch: pytest.MonkeyPatch, serve: str, said: str
) -> None:
    """Long before gloo gives up; with the stack, where there is one."""
    monkeypatch.setattr(launch, "_serve", getattr(ranks, serve))
    request = replace(request_of("tp1-pp2"), timeout=25)
    with pytest.raises(WorkerLostError, match=f"rank 1 of 2 {said}") as caught:
        run(request, HERE, progress=Silent(), on_step=lambda _: None)
    assert (" in hang " in " ".join(caught.value.where)) is (serve == "serve_and_hang")


def test_ctrl_c_ends_the_ranks(
    request_of: Callable[[str], Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reaches this process between two steps; the ranks would go on for ever."""
    monkeypatch.setattr(launch, "_serve", ranks.serve_for_ever)
    steps: list[Step] = []

    def interrupt(step: Step) -> None:
        steps.append(step)
        if len(steps) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(request_of("tp2-pp1"), HERE, progress=Silent(), on_step=interrupt)
    assert steps == [Step(tokens=((0, 7),), finished=())] * 3


def test_too_little_memory_of_this_machine_is_no_crash(
    request_of: Callable[[str], Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU's is a plain RuntimeError; whatever else goes wrong keeps its own."""
    import torch

    def beyond_the_address_space(*_: object, **__: object) -> None:
        torch.empty(1 << 50, dtype=torch.uint8)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(launch, "generate", beyond_the_address_space)
    with pytest.raises(EnvironmentMissingError, match="rank 0 has too little memory") as caught:
        run(request_of("tp1-pp1"), HERE, progress=Silent(), on_step=print)
    assert caught.value.where[0].startswith("can't allocate memory: you tried to allocate 11258999")
    assert "lower --batch-size or --max-new-tokens" in (caught.value.hint or "")
    monkeypatch.setattr(launch, "generate", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run(request_of("tp1-pp1"), HERE, progress=Silent(), on_step=print)


def test_torchruns_ranks_must_be_those_of_the_layout(
    request_of: Callable[[str], Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither fewer nor more; elsewhere any layout will do."""
    layout = request_of("tp2-pp2").layout
    check_world(layout)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_world(layout)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LayoutError, match="torchrun has started 2 ranks for layout tp2-pp2 of 4"):
        check_world(layout)
