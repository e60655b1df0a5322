"""Generation, resharding and RoPE against real ranks: no alarm, and each mistake is placed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness.bench import Bench
from harness.compare import Finding
from harness.hooks import HEALTHY, Fault
from harness.runner import run_case
from harness.suite import Case

if TYPE_CHECKING:
    from tests.harness.checks import seam_functions as faults
else:  # a module beside this file: tests are not a package
    sys.path.append(str(Path(__file__).parent))
    import seam_functions as faults

pytestmark = pytest.mark.ranks

TOY = "nano-4b"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One bench, so that the ranks are started once."""
    with Bench(tmp_path_factory.mktemp("seams"), timeout=60) as found:
        yield found


def finding(
    bench: Bench, check: str, fault: Fault = HEALTHY, *, layout: str = "tp2-pp1", toy: str = TOY,
    dtype: str = "float32",
) -> Finding:  # fmt: skip
    """What a check finds under a fault; anything but a finding fails the test."""
    case = Case(check=check, model=toy, dtype=dtype, layout=layout)
    result = run_case(case, bench if fault is HEALTHY else bench.under(fault))
    assert result.finding is not None, result.traceback
    return result.finding


@pytest.mark.parametrize("check", ["generation", "resharding", "rope"])
def test_a_healthy_model_passes(check: str, bench: Bench) -> None:
    """On two ranks, with every kind of block."""
    found = finding(bench, check, toy="51b")
    assert found.passed, found


def test_sequence_parallel_padding_is_no_difference(bench: Bench) -> None:
    """48 tokens are even, the prompt's 6 to 13 are not: ranks hold a padded token."""
    for check in ("generation", "rope"):
        assert finding(bench, check, layout="tp2-pp1-sp").passed


def test_a_crossed_cache_is_seen_by_generation_and_by_nothing_else(bench: Bench) -> None:
    """A single forward pass never reads the cache, so the logits are right."""
    found = finding(bench, "generation", faults.CACHE)
    assert not found.passed
    assert found.places[0].startswith("the reference, sequence ")
    case = Case(check="logits", model=TOY, dtype="float32", layout="tp2-pp1", probe="short")
    assert run_case(case, bench.under(faults.CACHE)).status == "passed"


def test_a_rank_with_another_output_layer_generates_other_tokens(bench: Bench) -> None:
    """The oracle sides with the reference."""
    found = finding(bench, "generation", faults.OUTPUT)
    assert not found.passed
    assert found.places
    assert all(place.startswith("Megatron, sequence ") for place in found.places)


def test_a_rotation_by_the_negative_angle_is_seen_behind_right_tables(bench: Bench) -> None:
    """Frequencies and angles alone would pass."""
    found = finding(bench, "rope", faults.BACKWARDS)
    assert not found.passed
    assert "Megatron, rank " in found.summary
    assert "rope.rotation: FAILED" in found.summary
    assert len(found.places) == 1


def test_one_ulp_at_the_last_position_is_seen_and_placed(bench: Bench) -> None:
    """Every position is compared, the one at the end of the context too."""
    found = finding(bench, "rope", faults.LAST_ANGLE)
    assert not found.passed
    assert "rank 0 part 0 angle [position, channel], positions counted[131071, 0]" in found.summary


def test_rows_beyond_the_vocabulary_that_are_not_zero_are_seen(bench: Bench) -> None:
    """Whether the memory happened to be zero or not: loading begins with NaN."""
    found = finding(bench, "resharding", faults.PADDING)
    assert not found.passed
    assert any("embedding.word_embeddings.weight" in place for place in found.places)


def test_one_flipped_bit_is_traced_to_the_files_it_is_in(bench: Bench) -> None:
    """Four of five sources are whole."""
    found = finding(bench, "resharding", faults.CUT)
    assert not found.passed
    assert all("files cut for tp1-pp2" in place for place in found.places)
    assert ": 1 elements differ between what the bridge loads from files" in found.summary


def test_a_wrong_export_of_what_megatron_saved_is_seen(bench: Bench) -> None:
    """All loads are right; one bit of the export is not."""
    found = finding(bench, "resharding", faults.EXPORT)
    assert not found.passed
    assert ": 1 elements differ, this one first" in found.summary
