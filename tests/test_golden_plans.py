"""The conversion plans of the published configurations, pinned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bridge.family import FAMILY
from bridge.hf_config import load_hf_config, spec_from_hf_config
from bridge.parameters import num_parameters
from bridge.plan import Plan

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((ROOT / "golden" / "plans.json").read_text())
CONFIGS = {path.stem: path for path in sorted((ROOT / "suites" / "variants").glob("*.json"))}


def test_every_configuration_has_a_golden_plan_and_every_golden_a_configuration() -> None:
    """Neither missing nor unused entries."""
    assert CONFIGS.keys() == GOLDEN.keys()


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_the_plan_of_a_published_configuration_is_the_recorded_one(name: str) -> None:
    """Parameters, tensors and every tile are what they were."""
    spec = spec_from_hf_config(load_hf_config(CONFIGS[name]))
    plan = Plan(spec, spec.padded_vocab_size(1))
    found = {
        "num_parameters": num_parameters(spec),
        "num_hf_tensors": len(plan.hf_shapes),
        "num_megatron_parameters": len(plan.mcore_shapes),
        "plan_sha256": plan.digest(),
    }
    assert GOLDEN[name] == found


@pytest.mark.parametrize(
    "member", [one for one in FAMILY if one.num_parameters], ids=lambda m: m.hub_id
)
def test_list_states_the_counts_of_the_configurations(member: object) -> None:
    """The table that `nemotron-bridge list` prints agrees with the configurations themselves."""
    from bridge.family import Published

    assert isinstance(member, Published)
    spec = spec_from_hf_config(load_hf_config(CONFIGS[member.hub_id.rpartition("/")[2]]))
    assert member.num_parameters == num_parameters(spec)
    assert member.num_layers == spec.num_layers
