"""A pool over torchrun's processes fails as loudly as one of this host, and works on afterwards."""

from __future__ import annotations

import os
import signal
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from bridge.errors import CheckpointError, UsageError
from bridge.spec import ParallelLayout
from harness.errors import (
    RanksUnavailableError,
    WorkerFailedError,
    WorkerTimeoutError,
)
from harness.launcher import RankPool
from harness.rank_processes import LocalRanks
from harness.torchrun import lead
from harness.torchrun import ranks as torchrun_ranks

if TYPE_CHECKING:
    from tests.harness import rank_functions as ranks
    from tests.harness.torchrun.conftest import Started
else:  # a module of the folder above: tests are not a package
    sys.path.append(str(Path(__file__).parents[1]))
    import rank_functions as ranks

pytestmark = pytest.mark.ranks
Make = Callable[[int, int], "Started"]
SIZE = 3
LEAD = textwrap.dedent("""
    import rank_functions as ranks
    from bridge.spec import ParallelLayout
    from harness.launcher import RankPool
    from harness.torchrun.lead import led, rank_source

    with led():
        pool = RankPool(timeout=60, source=rank_source())
        layout = ParallelLayout(tensor_model_parallel_size=2, num_layers_per_stage=(1,))
        print(*pool.run(layout, ranks.pid), flush=True)
        pool.run(layout, ranks.hang_on, 1)
""")


def layout(tp: int = 1, pp: int = 1) -> ParallelLayout:
    """One layer per stage."""
    return ParallelLayout(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        num_layers_per_stage=(1,) * pp,
    )


@pytest.fixture(scope="module")
def run(started: Make) -> Iterator[Started]:
    """This process leads two keepers, each on a host of its own as far as they know."""
    run = started(SIZE, 1)
    with ExitStack() as stack:
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in run.variables(0).items():
            environment.setenv(name, value)
        for rank in range(1, SIZE):
            run.start(rank)
        stack.enter_context(lead.led())
        yield run


@pytest.fixture
def pool(run: Started) -> Iterator[RankPool]:
    """A pool of its own for each test, on the same processes of torchrun."""
    del run
    with RankPool(timeout=60, source=lead.rank_source()) as found:
        yield found


def test_groups_form_over_the_processes_of_torchrun_anew_for_each_layout(pool: RankPool) -> None:
    """As on one host; the third process waits while two compute."""
    assert pool.run(layout(tp=2), ranks.describe) == [(0, 0, 0, 2), (1, 1, 0, 2)]
    assert pool.run(layout(pp=3), ranks.describe) == [(0, 0, 0, 3), (1, 0, 1, 3), (2, 0, 2, 3)]
    assert pool.run(layout(tp=3), ranks.total, 1.5) == [9.0] * 3
    assert pool.run(layout(), ranks.describe) == [(0, 0, 0, 1)]


def test_each_process_of_torchrun_is_the_parent_of_its_rank(pool: RankPool, run: Started) -> None:
    """On a cluster that is what puts a rank on its own host."""
    # Rank 0 comes from a server of this process, which may be older than the variables given to it.
    assert pool.run(layout(tp=3), ranks.environment, "RANK")[1:] == ["1", "2"]
    keepers = {process.pid for process in run.processes.values()}
    above = [{one.pid for one in psutil.Process(pid).parents()} for pid in pool.pids()]
    assert [found & keepers for found in above] == [
        set(), {run.processes[1].pid}, {run.processes[2].pid},
    ]  # fmt: skip
    assert os.getpid() in above[0]
    assert len(set(pool.pids())) == SIZE
    assert all(process.poll() is None for process in run.processes.values())


def test_a_rank_that_throws_is_named_with_its_traceback_and_log(pool: RankPool) -> None:
    """The log is read where it was written."""
    with pytest.raises(WorkerFailedError) as caught:
        pool.run(layout(tp=3), ranks.throw_on, 2, timeout=20)
    assert type(caught.value) is WorkerFailedError
    assert caught.value.rank == 2
    assert "in throw_on" in caught.value.rank_traceback
    assert "about to fail" in caught.value.log_tails[2]
    assert pool.run(layout(tp=3), ranks.total, 1.0) == [6.0] * 3


def test_a_killed_rank_is_reported_before_the_time_limit_and_replaced(pool: RankPool) -> None:
    """Its keeper goes on, with a new one."""
    before = pool.run(layout(tp=3), ranks.pid)
    with pytest.raises(WorkerFailedError, match="SIGKILL") as caught:
        pool.run(layout(tp=3), ranks.die_on, 1, timeout=30)
    assert type(caught.value) is WorkerFailedError
    assert caught.value.rank == 1
    after = pool.run(layout(tp=3), ranks.pid)
    assert not set(before) & set(after)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_hung_rank_is_reported_with_its_stack_and_replaced(pool: RankPool, rank: int) -> None:
    """The lead's own, too: it is a child as well."""
    pool.run(layout(tp=3), ranks.pid)
    with pytest.raises(WorkerTimeoutError, match="within 3 s") as caught:
        pool.run(layout(tp=3), ranks.hang_on, rank, timeout=3)
    assert caught.value.rank == rank
    assert "in hang_on" in caught.value.log_tails[rank]
    assert pool.run(layout(tp=3), ranks.total, 1.0) == [6.0] * 3


def test_a_rank_that_died_between_calls_is_replaced_and_told_of(
    pool: RankPool, caplog: pytest.LogCaptureFixture
) -> None:
    """Elsewhere as here."""
    victim = pool.run(layout(tp=3), ranks.pid)[2]
    os.kill(victim, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while pool._workers[2].is_idle() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert pool.run(layout(tp=3), ranks.total, 1.0) == [6.0] * 3
    assert f"rank 2 (process {victim}) was ended by SIGKILL" in caplog.text


def test_an_error_for_the_user_comes_through_as_itself(pool: RankPool) -> None:
    """Bad input is bad input wherever it is read."""
    with pytest.raises(CheckpointError) as caught:
        pool.run(layout(tp=2), ranks.refuse)
    assert caught.value.where == ("/there",)


def test_a_layout_of_more_ranks_than_processes_is_unavailable_and_costs_nothing(
    pool: RankPool,
) -> None:
    """Those that are there stay."""
    before = pool.run(layout(tp=3), ranks.pid)
    with pytest.raises(RanksUnavailableError, match="tp2-pp2 has 4 ranks, torchrun has started 3"):
        pool.run(layout(tp=2, pp=2), ranks.pid)
    assert pool.run(layout(tp=3), ranks.pid) == before


def test_a_second_pool_has_to_wait_for_the_first_to_close(run: Started) -> None:
    """A process of torchrun keeps one rank."""
    del run
    with RankPool(timeout=60, source=lead.rank_source()) as other:
        other.run(layout(tp=2), ranks.pid)
        with (
            RankPool(timeout=60, source=lead.rank_source()) as second,
            pytest.raises(RuntimeError, match="close the other pool"),
        ):
            second.run(layout(tp=2), ranks.pid)
        assert other.run(layout(tp=2), ranks.total, 1.0) == [3.0, 3.0]
    with RankPool(timeout=60, source=lead.rank_source()) as third:
        assert third.run(layout(tp=2), ranks.total, 1.0) == [3.0, 3.0]


def test_the_hosts_are_counted(run: Started) -> None:
    """Three processes of one host, whatever the environment says: names are the hosts' own."""
    del run
    found = lead.torchrun_ranks()
    assert found is not None
    assert found.per_host == [SIZE]
    assert found.capacity == SIZE


def test_files_that_a_rank_does_not_see_are_one_error(
    run: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which rank, which host, which file; the tokens are gone afterwards."""
    del run
    monkeypatch.setattr(torchrun_ranks, "_VISIBLE", 0.0)
    found = lead.torchrun_ranks()
    assert found is not None
    found.check_shared([tmp_path], [Path(__file__)])
    with pytest.raises(UsageError, match="do not see the files that rank 0 does") as caught:
        found.check_shared([tmp_path], [tmp_path / "only-here"])
    host = socket.gethostname()
    assert caught.value.where == tuple(
        f"rank {rank} on {host}: {tmp_path / 'only-here'}" for rank in (1, 2)
    )
    assert list(tmp_path.iterdir()) == []


def test_a_pool_without_torchrun_is_of_this_host() -> None:
    """It has any number of ranks."""
    with RankPool() as found:
        assert isinstance(found._source, LocalRanks)


@pytest.mark.cluster
def test_a_lost_keeper_ends_its_rank_and_leaves_the_others(started: Make) -> None:
    """As where a machine goes down; torchrun would end the run a little later."""
    run = started(SIZE, 1)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in run.variables(0).items():
            environment.setenv(name, value)
        keepers = [run.start(rank) for rank in range(1, SIZE)]
        with lead.led(), RankPool(timeout=60, source=lead.rank_source()) as pool:
            victim = pool.run(layout(tp=3), ranks.pid)[2]
            threading.Timer(0.5, keepers[1].kill).start()
            with pytest.raises(WorkerFailedError, match="rank 2 of 3 is gone") as caught:
                pool.run(layout(tp=3), ranks.hang_on, 2, timeout=30)
            assert type(caught.value) is WorkerFailedError
            with pytest.raises(WorkerFailedError, match="rank 2's process of torchrun is gone"):
                pool.run(layout(tp=3), ranks.pid)
            assert pool.run(layout(tp=2), ranks.total, 1.0) == [3.0, 3.0]
            assert ranks.gone([victim])
    found = run.outputs()
    assert found[1] == (0, "", "")


@pytest.mark.cluster
def test_keepers_and_ranks_end_with_a_lead_that_was_killed(started: Make) -> None:
    """Quietly: torchrun has a failure to report, and it is not theirs."""
    run = started(2, 2)
    first = run.start(0, "-c", LEAD)
    run.start(1)
    assert first.stdout is not None
    pids = [int(word) for word in first.stdout.readline().split()]
    assert len(pids) == 2
    first.kill()
    assert run.outputs()[1] == (0, "", "")
    assert ranks.gone(pids)
