"""The catalogue: enough faults, each told apart, each able to reach a rank process."""

from __future__ import annotations

import pickle
from collections import Counter
from types import SimpleNamespace

import pytest

from bridge.hf_config import spec_from_hf_config
from bridge.spec import BlockSpec, GroupedQueryAttention, ModelSpec, RopeSpec, SwiGLU
from harness.errors import SuiteError
from harness.faults import CATALOGUE, applicable, fault_named
from harness.faults.matrix import DEFAULT_TOYS, shows
from harness.hooks import SEAMS, seams_of
from harness.toys import TOYS

FAMILIES = {
    "mapping", "layout", "configuration", "rope", "norm", "arithmetic", "parallel", "launch",
    "storage", "reference",
}  # fmt: skip


def spec_of(toy: str) -> ModelSpec:
    """A toy's model."""
    return spec_from_hf_config(TOYS[toy].config)


def test_there_are_sixty_faults_or_more_in_every_family() -> None:
    """No family is left out."""
    assert len(CATALOGUE) >= 60
    assert set(Counter(fault.family for fault in CATALOGUE.values())) == FAMILIES


def test_every_seam_is_used() -> None:
    """A seam that no fault comes in by is not proved to be one."""
    assert set().union(*map(seams_of, CATALOGUE.values())) == set(SEAMS)


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_fault_says_what_it_stands_for_and_travels(name: str) -> None:
    """It has a name of its own, a bug it stands for, a seam, and can be sent to a rank."""
    fault = CATALOGUE[name]
    assert fault.name == name
    assert len(fault.stands_for) > 10
    assert seams_of(fault)
    assert pickle.loads(pickle.dumps(fault)).name == name  # noqa: S301 - our own


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_fault_has_a_toy_to_spoil(name: str) -> None:
    """At least one toy of the matrix has what it spoils, and can be cut as it needs."""
    assert any(shows(CATALOGUE[name], spec_of(toy)) for toy in DEFAULT_TOYS)


@pytest.mark.parametrize("own", [1e-12, 1e-6, 3e-6, 9e-6, 1e-5, 9.9e-5, 1e-4, 1.1e-4, 1e-3])
def test_another_epsilon_is_far_from_any_that_a_model_can_have(own: float) -> None:
    """Of the reference and of the oracle alike: what is near the model's own is not seen."""
    norm = SimpleNamespace(variance_epsilon=own)
    model = SimpleNamespace(modules=lambda: [norm])
    reference, oracle = CATALOGUE["reference-epsilon"].reference, CATALOGUE["oracle-epsilon"].oracle
    assert reference is not None
    assert oracle is not None
    reference(model)
    for found in (norm.variance_epsilon, oracle({"rms_norm_eps": own})["rms_norm_eps"]):
        assert abs(found - own) > 5e-5


def test_most_faults_have_three_toys() -> None:
    """Only what is bound to a trait, such as linear replacements, has fewer."""
    few = [
        name
        for name, fault in CATALOGUE.items()
        if sum(applicable(fault, spec_of(toy)) for toy in DEFAULT_TOYS) < 3
    ]
    assert len(few) < len(CATALOGUE) / 5


def test_an_unknown_fault_is_refused_by_name() -> None:
    """With where to look."""
    with pytest.raises(SuiteError, match="no fault is called 'nonsense'") as caught:
        fault_named("nonsense")
    assert "--list" in (caught.value.hint or "")


def other_model() -> ModelSpec:
    """One that already has what the faults set: epsilon 1e-6, theta 10000, four groups of four."""
    block = BlockSpec(
        attention=GroupedQueryAttention(num_query_groups=4), ffn=SwiGLU(ffn_hidden_size=256)
    )
    return ModelSpec(
        hidden_size=128, num_attention_heads=16, kv_channels=8, vocab_size=301,
        max_position_embeddings=4096, layernorm_epsilon=1e-6, rope=RopeSpec(rotary_base=10000.0),
        share_embeddings_and_output_weights=False, params_dtype="float32", blocks=(block, block),
        heterogeneous_block_specs=True,
    )  # fmt: skip


def test_no_fault_of_the_configuration_leaves_a_model_as_it_is() -> None:
    """A mistake that a model happens to be right about is another mistake there, or none."""
    spec = other_model()
    applying = [
        fault for fault in CATALOGUE.values() if fault.spec is not None and applicable(fault, spec)
    ]
    assert {"norm-eps", "rope-theta"} <= {fault.name for fault in applying}
    assert "groups-for-group-size" not in {fault.name for fault in applying}
    for fault in applying:
        assert fault.spec is not None
        assert fault.spec(spec) != spec, fault.name


def test_only_what_goldens_alone_kill_is_left_to_them() -> None:
    """A model without records is tried on all others."""
    assert {name for name, fault in CATALOGUE.items() if fault.only_recorded} == {
        "random-stream-moved"
    }
