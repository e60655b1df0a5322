"""Every check passes on a healthy bridge and fails on the mistakes that it is there for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from harness.bench import Bench
from harness.checks import CHECKS
from harness.faults import fault_named
from harness.hooks import HEALTHY, Fault
from harness.runner import Result, run_case
from harness.suite import Case

pytestmark = pytest.mark.ranks

TOY = "super-49b-v1_5"
LAYOUT = "tp2-pp1"
Outcome = dict[str, Result]


def outcome(
    tmp_path: Path, fault: Fault, checks: Sequence[str], *, layout: str = LAYOUT
) -> Outcome:
    """Run checks under a fault; results by check name, `logits` and `layouts` on the long probe."""
    found = {}
    with Bench(tmp_path, fault=fault, timeout=60) as bench:
        for name in checks:
            axes = CHECKS[name].axes
            case = Case(
                check=name,
                model=TOY,
                dtype="float32",
                layout=layout if "layout" in axes else None,
                probe="long" if "probe" in axes else None,
            )
            found[name] = run_case(case, bench)
    return found


def statuses(found: Outcome) -> dict[str, str]:
    """Check name to status; with the reason where a check could not be carried out."""
    return {
        name: result.status if result.status != "error" else result.traceback
        for name, result in found.items()
    }


def test_every_check_passes_on_a_healthy_model(tmp_path: Path) -> None:
    """No false alarm."""
    found = outcome(tmp_path, HEALTHY, list(CHECKS))
    assert dict.fromkeys(CHECKS, "passed") == statuses(found)


def test_swapped_gate_and_up_are_seen_by_placement_and_logits_alone(tmp_path: Path) -> None:
    """A round trip undoes its own mistake: that is why there is a placement check."""
    found = outcome(
        tmp_path,
        fault_named("gate-up-swapped"),
        ["config", "round_trip", "placement", "rope", "logits"],
    )
    assert statuses(found) == {
        "config": "passed",
        "round_trip": "passed",
        "placement": "failed",
        "rope": "passed",
        "logits": "failed",
    }
    assert (
        "decoder.layers.0.mlp.linear_fc1.weight[0, 0] holds "
        "model.layers.0.mlp.up_proj.weight[0, 0], Megatron reads "
        "model.layers.0.mlp.gate_proj.weight[0, 0] there"
    ) in found["placement"].summary


def test_ungrouped_qkv_is_seen_by_placement_and_logits_alone(tmp_path: Path) -> None:
    """Same shape, same bits, another order.

    On one rank: at TP=2 each rank has one of the two groups, and one group is in order either way.
    """
    checks = ["round_trip", "placement", "logits"]
    found = outcome(tmp_path, fault_named("qkv-stacked"), checks, layout="tp1-pp1")
    assert statuses(found) == {"round_trip": "passed", "placement": "failed", "logits": "failed"}
    # 16 heads in 2 groups of head size 8: after the group's 64 query rows comes its key.
    assert (
        "linear_qkv.weight[64, 0] holds model.layers.0.self_attn.q_proj.weight[64, 0], "
        "Megatron reads model.layers.0.self_attn.k_proj.weight[0, 0] there"
    ) in found["placement"].summary


def test_one_moved_key_head_is_seen_and_named(tmp_path: Path) -> None:
    """The tile that is wrong, and whose rows are in it."""
    found = outcome(tmp_path, fault_named("k-heads-swapped"), ["round_trip", "placement", "logits"])
    assert statuses(found) == {"round_trip": "passed", "placement": "failed", "logits": "failed"}
    assert (
        "linear_qkv.weight[64, 0] holds model.layers.0.self_attn.k_proj.weight[8, 0]"
        in found["placement"].summary
    )
    assert "1024 elements wrong, in rows 64-71" in found["placement"].summary


def test_a_wrong_rope_factor_is_seen_by_config_rope_and_long_logits(tmp_path: Path) -> None:
    """Super v1 and v1.5 differ in nothing else."""
    found = outcome(
        tmp_path, fault_named("rope-factor"), ["config", "placement", "rope", "logits", "layouts"]
    )
    assert statuses(found) == {
        "config": "failed",
        "placement": "passed",
        "rope": "failed",
        "logits": "failed",
        "layouts": "passed",
    }
    assert "(8.0, 1.0, 4.0, 8192) is not (16.0, 1.0, 4.0, 8192)" in found["config"].summary
    logits = found["logits"].finding
    assert logits is not None
    assert logits.places[0].startswith("the oracle sides with the reference")


def test_a_wrong_epsilon_is_seen_by_config_and_logits(tmp_path: Path) -> None:
    """The fault nearest to being harmless."""
    found = outcome(tmp_path, fault_named("norm-eps"), ["config", "rope", "logits"])
    assert statuses(found) == {"config": "failed", "rope": "passed", "logits": "failed"}
    assert "1e-06 is not 1e-05" in found["config"].summary


def test_one_flipped_bit_is_seen_and_placed(tmp_path: Path) -> None:
    """In a checkpoint of 2 million numbers, one differs by one bit."""
    found = outcome(
        tmp_path, fault_named("file-bit-flipped"), ["round_trip", "resharding", "logits"]
    )
    assert statuses(found) == {
        "round_trip": "failed",
        "resharding": "failed",
        "logits": "passed",  # it loads the Hugging Face checkpoint, which is whole
    }
    expected = ": 1 elements differ, this one first; in decoder.layers."
    assert expected in found["round_trip"].summary


def test_a_wrong_reference_is_named_as_the_odd_one_out(tmp_path: Path) -> None:
    """Two against one: the oracle and Megatron agree."""
    found = outcome(tmp_path, fault_named("reference-norm-scaled"), ["rope", "logits"])
    assert statuses(found) == {"rope": "passed", "logits": "failed"}
    logits = found["logits"].finding
    assert logits is not None
    assert logits.places[0].endswith("the reference's logits are wrong")


def test_a_rank_with_other_weights_is_seen_by_logits_and_layouts(tmp_path: Path) -> None:
    """The harness's own launch can be wrong too."""
    found = outcome(tmp_path, fault_named("rank-other-weights"), ["logits", "layouts", "placement"])
    assert statuses(found) == {"logits": "failed", "layouts": "failed", "placement": "failed"}
