"""Ranks of torchrun that stop, hang, leave or disagree: an end within a bound, and why.

Without torchrun, who would end the others: the ranks themselves must see to it.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from bridge.crew import bounds
from bridge.crew.agreement import agree
from bridge.crew.protocol import Alone, Value
from bridge.errors import DisagreementError
from harness.toys import toy_named, write_checkpoint

if TYPE_CHECKING:
    from tests import leftovers
    from tests.bridge.crew.rank_scripts import ranks
else:  # modules beside this file and above it: tests are not a package
    sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    import leftovers
    from rank_scripts import ranks

TIMEOUT = 6.0
"""Seconds given as `--timeout`."""
NOTICED = TIMEOUT + bounds.ACCORD + 2 * bounds.DEATH + 60
"""Seconds until a run has ended in which a rank is stopped, with its start on a busy machine."""


@pytest.mark.ranks
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.cluster), 1])
def test_a_stopped_rank_is_named_by_the_others(
    rank: int, tmp_path: Path, session: leftovers.Session
) -> None:
    """It is ended, too: nobody else would. Rank 0 serves the store, which is silent then, too."""
    started = time.monotonic()
    found = ranks(
        f"crew.run(functions.stop, {rank})", tmp_path, timeout=TIMEOUT,
        variables=session.variables(),
    )  # fmt: skip
    code, out, _ = found[1 - rank]
    assert code == 3
    assert out.startswith(
        f"BR501 rank {rank} of 2 has given no sign of life for 6 s: it is stopped; the target was"
    )
    assert found[rank][0] == -signal.SIGKILL
    assert time.monotonic() - started < NOTICED
    assert session.leftovers(seconds=5) == []


@pytest.mark.ranks
@pytest.mark.cluster
@pytest.mark.parametrize("rank", [0, 1])
def test_a_hung_rank_is_named_with_where_it_hangs(
    rank: int, tmp_path: Path, session: leftovers.Session
) -> None:
    """By rank 0, or for want of that by itself; it ends though its main thread never would."""
    found = ranks(
        f"crew.run(functions.hang, {rank})", tmp_path, size=3, timeout=TIMEOUT,
        variables=session.variables(),
    )  # fmt: skip
    assert [code for code, _, _ in found] == [3, 3, 3]
    said = found[0][1] + found[0][2]
    assert said.startswith(f"BR501 rank {rank} of 3 has made no progress for 6 s; the target was")
    assert "in hang" in said
    assert "crew_functions.py" in said
    assert [out for _, out, _ in found[1:]] == ["", ""]
    assert "Traceback (" not in found[1][2] + found[2][2]
    assert session.leftovers(seconds=5) == []


@pytest.mark.ranks
@pytest.mark.cluster
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("functions.leave_by_exit, 1", "rank 1 of 3 left: SystemExit(7); the target was not"),
        (f"functions.interrupt, 1, {int(signal.SIGINT)}", "rank 1 of 3 was interrupted; the"),
        ("functions.leave, -7", "1 of 3 ranks died; the target was not created\n  --> rank 1: p"),
    ],
)
def test_a_rank_that_leaves_is_the_first_cause_of_all(
    body: str, said: str, tmp_path: Path, session: leftovers.Session
) -> None:
    """Said once, by rank 0; nobody waits for who will not come."""
    found = ranks(f"crew.run({body})", tmp_path, size=3, variables=session.variables())
    assert found[0][:2] == (3, found[0][1])
    assert found[0][1].startswith(f"BR501 {said}")
    assert found[2] == (3, "", "")
    assert session.leftovers(seconds=5) == []


@pytest.mark.ranks
def test_ranks_of_other_plans_write_nothing_and_say_who_has_what(
    tmp_path: Path, session: leftovers.Session
) -> None:
    """Another cut, another source, another dtype, another version, all in one error."""
    write_checkpoint(toy_named("nano-4b"), tmp_path / "hf0", dtype="bfloat16")
    write_checkpoint(toy_named("nano-4b"), tmp_path / "hf1", dtype="float32")
    body = (
        "import bridge.crew.agreement as agreement\n"
        "        agreement.__version__ += '-other' * crew.rank\n"
        f"        crew.run(import_checkpoint, Path({str(tmp_path)!r}) / f'hf{{crew.rank}}', "
        "Path('m').resolve(), tensor_model_parallel_size=1 + crew.rank)"
    )
    first, second = ranks(body, tmp_path, variables=session.variables())
    assert first[0] == second[0] == 2
    assert first[1].startswith("BR502 the 2 processes are not about to do the same; nothing was")
    for fact in ("nemotron-bridge 0.1.0-other, rank 0 has 0.1.0\n", "target's files ", "source "):
        assert f"--> rank 1: {fact}" in first[1]
    assert "--dtype" not in first[1]
    assert second[1:] == ("", "")
    assert not (tmp_path / "m").exists()
    assert session.leftovers(seconds=5) == []


class Told(Alone):
    """A crew whose other ranks say what they are given, and else the same."""

    size = 3  # type: ignore[misc]  # it only seems to be alone

    def __init__(self, *others: dict[str, str]) -> None:
        super().__init__()
        self._others = others

    def gather(self, value: Value) -> list[Value]:
        """This one's first."""
        assert isinstance(value, dict)
        return [value, *(cast("Value", {**value, **other}) for other in self._others)]


def test_every_fact_that_differs_is_listed_with_its_rank() -> None:
    """And no other; a long one as a digest of all of it."""
    with pytest.raises(DisagreementError) as caught:
        agree(Told({"--seed": "1"}, {"b": "x", "c": "y"}), {"--seed": 0, "b": "z" * 100})
    assert caught.value.where == (
        "rank 1: --seed 1, rank 0 has 0",
        # printf '%0100d' 0 | tr 0 z | sha256sum
        "rank 2: b x, rank 0 has sha256 bd7475717a88",
        "rank 2: c y, rank 0 has none",
    )
    agree(Told({}, {}), {"--seed": 0})
    agree(Alone(), {"--seed": 0})
