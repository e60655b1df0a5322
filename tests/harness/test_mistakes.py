"""The table of mistakes: without one it is the oracle, and each is told from all others."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from harness import oracle
from harness.mistakes import Setup, mistakes, suspects
from harness.mistakes.attention import windowed_attention
from harness.probes import long_probe
from harness.toys import TOYS, toy_named


def setup_of(toy: str, layer_idx: int, *, tp: int = 1) -> Setup:
    """A block of a toy on the long probe, given the oracle's own state."""
    found = toy_named(toy)
    model = found.architecture
    weight = dict(found.weights()).__getitem__  # drawn once
    probe = long_probe(model.vocab_size)
    states: list[oracle.Array] = []
    oracle.forward(
        found.config, weight, probe.input_ids, probe.position_ids,
        capture=lambda _layer_idx, hidden: states.append(hidden),
    )  # fmt: skip
    return Setup(
        model=model, weight=weight, layer_idx=layer_idx, hidden=states[max(layer_idx, 0)],
        input_ids=probe.input_ids, position_ids=probe.position_ids, tp=tp,
    )  # fmt: skip


def block_of(setup: Setup, model: oracle.Architecture) -> oracle.Array:
    """The oracle's block for another reading of the configuration."""
    angles = oracle.rotary_angles(model, setup.position_ids[None])
    return oracle.block(setup.hidden, angles, setup.weight, model, setup.layer_idx)


@pytest.mark.parametrize("toy", ["51b", "ultra-253b", "tied"])
def test_without_a_mistake_it_is_the_oracle(toy: str) -> None:
    """Bit for bit, for every kind of block."""
    for layer_idx in range(len(TOYS[toy].architecture.blocks)):
        setup = setup_of(toy, layer_idx)
        np.testing.assert_array_equal(setup.compute(), block_of(setup, setup.model))


def test_attention_without_a_look_ahead_is_the_oracles() -> None:
    """The second way to write attention, but for rounding."""
    setup = setup_of("super-49b-v1", 0)
    own = dataclasses.replace(
        setup,
        attention=lambda *args, **kwargs: windowed_attention(0, oracle.rotate, *args, **kwargs),
    )
    np.testing.assert_allclose(own.compute(), setup.compute(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("norm-eps", {"layernorm_epsilon": 1e-6}),
        ("rope-theta", {"rope": oracle.Rope(10000.0, (8.0, 1.0, 4.0, 8192))}),
        ("rope-low-freq-factor", {"rope": oracle.Rope(500000.0, (8.0, 2.0, 4.0, 8192))}),
        ("rope-high-freq-factor", {"rope": oracle.Rope(500000.0, (8.0, 1.0, 8.0, 8192))}),
        ("rope-original-length", {"rope": oracle.Rope(500000.0, (8.0, 1.0, 4.0, 4096))}),
    ],
)
def test_another_configuration_is_told_from_all_other_mistakes(
    name: str, changes: dict[str, object]
) -> None:
    """Computed by the oracle itself from the other configuration."""
    setup = setup_of("nano-8b", 0)  # enough frequencies for every value to matter
    wrong = dataclasses.replace(setup.model, **changes)  # type: ignore[arg-type]
    best, second, *_ = suspects(setup, block_of(setup, wrong))
    assert best.name == name
    assert best.explains == pytest.approx(1)
    assert second.explains < 0.9


def test_swapped_projections_are_told_from_all_other_mistakes() -> None:
    """Gate and up exchanged by hand."""
    setup = setup_of("super-49b-v1_5", 0)
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}

    def swapped(name: str) -> oracle.Rows:
        part = name.split(".")[-2]
        return setup.weight(name.replace(part, other.get(part, part)))

    computed = dataclasses.replace(setup, weight=swapped).compute()
    best = suspects(setup, computed)[0]
    assert (best.name, round(best.explains, 9)) == ("gate-up-swapped", 1)


@pytest.mark.parametrize(("layer_idx", "tp"), [(-1, 1), (8, 2)])
def test_every_mistake_is_recognised_by_its_own_result(layer_idx: int, tp: int) -> None:
    """No two of the table are one: what a mistake gives is explained in full by its name."""
    setup = setup_of("super-49b-v1_5", layer_idx, tp=tp)
    truth = setup.compute()
    seen = 0
    for name, _, changed in mistakes(setup):
        try:
            computed = changed.compute()
        except ValueError:
            continue  # another block's weights, of another kind
        if computed.shape != truth.shape or np.abs(computed - truth).max() < 1e-6:
            continue  # harmless on this model, such as positions from one
        same = {one.name for one in suspects(setup, computed) if one.explains > 1 - 1e-6}
        assert name in same, name
        seen += 1
    assert seen > 2


def test_the_truth_has_no_suspect() -> None:
    """Nothing is to be explained."""
    setup = setup_of("super-49b-v1_5", 0)
    assert suspects(setup, setup.compute()) == []
