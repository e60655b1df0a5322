"""A deliberate fault is traced to exactly the tile that is damaged, or to the mistake made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest

from harness import localize
from harness.bench import Bench
from harness.checks import CHECKS
from harness.compare import Finding
from harness.hooks import HEALTHY, Fault
from harness.ranks import RankContext
from harness.suite import Case

pytestmark = pytest.mark.ranks

TOY = "super-49b-v1_5"
"""16 heads of 8 channels in 2 groups: 64 query rows, 8 of K, 8 of V, twice."""


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One bench, whose ranks serve every fault."""
    with Bench(tmp_path_factory.mktemp("bench"), timeout=60) as bench:
        yield bench


def find(bench: Bench, fault: Fault, *, check: str = "blocks", layout: str = "tp1-pp1") -> Finding:
    """The finding of a check on the short probe, under a fault."""
    case = Case(check=check, model=TOY, dtype="float32", layout=layout, probe="short")
    return CHECKS[check].run(case, bench.under(fault))


def located(finding: Finding) -> dict[str, Any]:
    """Where the finding says the trouble is."""
    found: dict[str, Any] = finding.details["localisation"]
    assert found["trouble"] == []
    return found


@contextlib.contextmanager
def changed_weights(change: Any, context: RankContext) -> Iterator[None]:  # noqa: ANN401 - a function
    """Rank 0 changes its weights after they are loaded."""
    import torch

    from bridge import live_parameters

    load = live_parameters.load_hf

    def load_and_change(parts: Any, *args: Any) -> None:  # noqa: ANN401 - the function's own
        load(parts, *args)
        if context.rank == 0:
            with torch.no_grad():
                change({name: p for part in parts for name, p in part.named_parameters()})

    with mock.patch.object(live_parameters, "load_hf", load_and_change):
        yield


QKV = "decoder.layers.3.self_attention.linear_qkv.weight"


def swap_keys(live: dict[str, Any]) -> None:
    """Block 3's query groups have each other's K."""
    first = live[QKV][64:72].clone()
    live[QKV][64:72] = live[QKV][144:152]
    live[QKV][144:152] = first


def flip_a_bit(live: dict[str, Any]) -> None:
    """Bit 3 of one element of query group 1's V."""
    import torch

    live[QKV].view(torch.int32)[155, 17] ^= 8


def scale_a_norm(live: dict[str, Any]) -> None:
    """One norm is a thousandth too large."""
    live["decoder.layers.5.pre_mlp_layernorm.weight"].mul_(1.001)


def other_layers_down(live: dict[str, Any]) -> None:
    """Blocks 0 and 7 have one width: 7 gets the weights of 0."""
    live["decoder.layers.7.mlp.linear_fc2.weight"].copy_(
        live["decoder.layers.0.mlp.linear_fc2.weight"]
    )


def lose_a_gate(live: dict[str, Any]) -> None:
    """The gate of block 2 was never loaded."""
    weight = live["decoder.layers.2.mlp.linear_fc1.weight"]
    weight[: len(weight) // 2] = float("nan")


def lose_half_a_head(live: dict[str, Any]) -> None:
    """Rows 4 to 7 of query head 0."""
    live[QKV][4:8] = 0


@pytest.mark.parametrize(
    ("change", "places", "cause"),
    [
        (
            swap_keys,
            [
                "layer 3 linear_qkv rows 64-71 = query group 0's K (holds query group 1's K)",
                "layer 3 linear_qkv rows 144-151 = query group 1's K (holds query group 0's K)",
            ],
            "k-heads-swapped",
        ),
        (
            flip_a_bit,
            [
                (
                    "layer 3 linear_qkv rows 155-155 in query group 1's V "
                    "(1 element [155, 17]: bit 3 flipped)"
                )
            ],
            "bit-flipped",
        ),
        (scale_a_norm, ["layer 5 pre_mlp_layernorm, all of it (x 1.001)"], "scaled"),
        (
            other_layers_down,
            ["layer 7 linear_fc2, all of it (holds layer 0's down)"],
            "layers-swapped",
        ),
        (lose_a_gate, ["layer 2 linear_fc1 rows 0-255 = gate (NaN)"], "not-loaded"),
        (
            lose_half_a_head,
            ["layer 3 linear_qkv rows 4-7 in query group 0's head 0 (zeros)"],
            "not-loaded",
        ),
    ],
)
def test_exactly_the_damaged_tile_is_named(
    healthy: Bench,
    change: Any,  # noqa: ANN401 - a function
    places: list[str],
    cause: str,
) -> None:
    """What the test has damaged, no more and no less, and what is there instead."""
    if change is other_layers_down:
        shapes = {toy_width(0), toy_width(7)}
        assert len(shapes) == 1, "the toy has changed: take two blocks of one width"
    fault = Fault(name=f"change-{change.__name__}", rank=partial(changed_weights, change))
    # On the damaged bit the model may still pass: ask the localisation itself.
    case = Case(check="blocks", model=TOY, dtype="float32", layout="tp1-pp1", probe="short")
    found = localize.localise(case, healthy.under(fault))
    assert list(found.places[: len(places)]) == places
    assert list(found.places[len(places) :]) == [f"suspected cause: {cause}"]
    assert found.cause == cause
    assert len(found.damage) == len(places)


def toy_width(layer_idx: int) -> int:
    """Width of a block's feed-forward."""
    from harness.oracle import Mlp
    from harness.toys import toy_named

    ffn = toy_named(TOY).architecture.blocks[layer_idx][1]
    assert isinstance(ffn, Mlp)
    return ffn.ffn_hidden_size


def test_a_rank_is_named_where_there_are_several(healthy: Bench) -> None:
    """At TP=2 each rank has a group of its own; rows are those of the rank."""
    fault = Fault(name="scaled-on-one-rank", rank=partial(changed_weights, scale_keys))
    found = find(healthy, fault, layout="tp2-pp1")
    assert not found.passed
    assert located(found)["places"] == [
        "layer 3 linear_qkv rows 64-71 = query group 0's K (x 2) on rank 0",
        "suspected cause: scaled",
    ]


def scale_keys(live: dict[str, Any]) -> None:
    """Query group 0's K doubled."""
    live[QKV][64:72] *= 2


@pytest.mark.parametrize(
    ("fault", "cause", "says"),
    [
        ("norm-eps", "norm-eps", "an epsilon of 1e-06"),
        ("rope-factor", "rope-factor", "factor 8"),
        ("rope-plain", "rope-plain", "llama3 scaling left out"),
    ],
)
def test_a_wrong_configuration_is_the_suspect(
    healthy: Bench, fault: str, cause: str, says: str
) -> None:
    """All weights are right; of all mistakes the one that was made explains nearly all."""
    wrong = Fault(name=f"config-{fault}", spec=partial(_misread, fault))
    case = Case(check="blocks", model=TOY, dtype="float32", layout="tp1-pp1", probe="long")
    found = CHECKS["blocks"].run(case, healthy.under(wrong))
    where = located(found)
    assert not found.passed
    assert where["damage"] == []
    assert (where["side"], where["cause"]) == ("megatron", cause)
    assert where["suspects"][0]["says"] == says
    assert where["suspects"][0]["explains"] > 0.9


def _misread(what: str, spec: Any) -> Any:  # noqa: ANN401 - a ModelSpec
    from dataclasses import replace

    if what == "norm-eps":
        return replace(spec, layernorm_epsilon=1e-6)
    scaling = None if what == "rope-plain" else replace(spec.rope.scaling, factor=8.0)
    return replace(spec, rope=replace(spec.rope, scaling=scaling))


def _no_residual(_layer: Any, _args: Any, kwargs: Any, output: Any) -> Any:  # noqa: ANN401 - a hook
    return (output[0] - kwargs["hidden_states"], *output[1:])


@contextlib.contextmanager
def block_4_without_residual(_context: RankContext) -> Iterator[None]:
    """Block 4 does not add its input."""
    from bridge import model

    build = model.build_model

    def changed(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the function's own
        parts = build(*args, **kwargs)
        for part in parts:
            for layer in part.decoder.layers:
                if layer.layer_number == 5:
                    layer.register_forward_hook(_no_residual, with_kwargs=True)
        return parts

    with mock.patch.object(model, "build_model", changed):
        yield


def test_the_first_wrong_block_is_named_and_the_others_are_right(healthy: Bench) -> None:
    """Teacher-forced, block 4 alone is over its limit; free, all that follow are too."""
    fault = Fault(name="residual", rank=block_4_without_residual)
    found = find(healthy, fault, layout="tp1-pp2-vp2")
    where = located(found)
    assert (where["block"], where["cause"]) == (4, "residual-dropped")
    assert found.summary.startswith("block 4 (")
    assert found.value is not None
    assert found.limit is not None
    over = [
        [row["layer_idx"] for row in found.details["blocks"] if row[key] > found.limit]
        for key in ("teacher_excess", "free_excess")
    ]
    assert over == [[4], [4, 5, 6, 7]]


def _scale_norm(model: Any) -> None:  # noqa: ANN401 - transformers is not typed
    model.model.layers[6].input_layernorm.weight.data *= 1.001


def test_a_wrong_reference_is_the_odd_one_out(healthy: Bench) -> None:
    """Megatron and the oracle agree: the trouble is looked for in the reference."""
    fault = Fault(name="reference-norm", reference=_scale_norm)
    for check in ("blocks", "logits"):
        where = located(find(healthy, fault, check=check))
        assert (where["side"], where["block"]) == ("reference", 6)
        assert "model.layers.6.input_layernorm.weight" in where["places"][-1]
        assert "x 1.001" in where["places"][-1]


def test_a_wrong_oracle_is_the_odd_one_out(healthy: Bench) -> None:
    """Megatron and the reference agree, and what they agree on is the true epsilon."""
    fault = Fault(name="oracle-eps", oracle=partial(_with, {"rms_norm_eps": 1e-3}))
    where = located(find(healthy, fault))
    assert where["side"] == "oracle"
    assert where["suspects"][0]["says"] == "an epsilon of 1e-05"


def _with(changes: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    return config | changes


def test_an_error_inside_does_not_hide_the_finding(
    healthy: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finding stands, and a line says why there is no explanation."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError("broken on purpose")

    monkeypatch.setattr(localize, "localise", broken)
    fault = Fault(name="residual-again", rank=block_4_without_residual)
    found = find(healthy, fault)
    assert not found.passed
    assert found.places[-1] == "localisation failed: ZeroDivisionError: broken on purpose"


@pytest.mark.parametrize("layout", ["tp1-pp1", "tp2-pp1", "tp2-pp2-vp2", "tp1-pp2-uneven"])
def test_healthy_blocks_pass_in_every_layout(healthy: Bench, layout: str) -> None:
    """No false alarm, and every block is in the evidence."""
    found = find(healthy, HEALTHY, layout=layout)
    assert found.passed, found.places
    assert [row["layer_idx"] for row in found.details["blocks"]] == [-1, *range(8)]
    kinds = [row["kind"] for row in found.details["blocks"]]
    assert kinds[:2] == ["embedding", "attention with 2 query groups + SwiGLU 512"]


def test_sequence_parallel_shares_are_put_together(healthy: Bench) -> None:
    """Each rank has half of the tokens; together they are as one rank's."""
    assert find(healthy, HEALTHY, layout="tp2-pp1-sp").passed


def test_nothing_is_damaged_in_a_healthy_model(healthy: Bench) -> None:
    """Asked without a reason, the localisation finds none."""
    case = Case(check="blocks", model=TOY, dtype="float32", layout="tp2-pp1", probe="short")
    found = localize.localise(case, healthy)
    assert (found.side, found.cause, list(found.damage)) == ("", "", [])
