"""Gradients of real Megatron-Core ranks: right in every kind of layout; wrong ones are found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness.bench import Bench
from harness.compare import Finding
from harness.faults import fault_named
from harness.hooks import HEALTHY
from harness.runner import run_case
from harness.suite import Case

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One for all tests here: ranks and references are shared."""
    with Bench(tmp_path_factory.mktemp("gradients")) as found:
        yield found


def finding(
    bench: Bench, model: str, layout: str, *, dtype: str = "float32", fault: str | None = None
) -> Finding:
    """What the check finds, perhaps under a fault."""
    case = Case(check="gradients", model=model, dtype=dtype, layout=layout)
    used = bench if fault is None else bench.under(fault_named(fault))
    assert (used.fault is HEALTHY) == (fault is None)
    result = run_case(case, used)
    assert result.finding is not None, result.traceback
    return result.finding


@pytest.mark.parametrize(
    ("model", "layout", "dtype"),
    [
        ("tied", "tp1-pp1", "float32"),
        ("puzzle", "tp2-pp1", "bfloat16"),
        ("tied", "tp2-pp2", "float32"),
        ("puzzle", "tp2-pp2-vp2", "float32"),
        ("tied", "tp2-pp2-sp", "float32"),
        ("nano-4b", "tp2-pp1-sp", "float32"),
        ("nano-4b", "tp1-pp4-l0.5.0.1", "float32"),
    ],
)
def test_gradients_are_as_close_to_the_truth_as_the_references(
    bench: Bench, model: str, layout: str, dtype: str
) -> None:
    """TP, PP, interleaved, uneven and empty stages, sequence parallel, tied, linears and no-ops."""
    found = finding(bench, model, layout, dtype=dtype)
    assert found.passed, (found.summary, found.places)
    assert found.details["ranks_disagree_in_some_bits"] == []
    assert found.details["problems"] == []
    config = bench.config(Case(check="gradients", model=model, dtype=dtype))
    assert found.details["tensors"] > config["num_hidden_layers"]


@pytest.mark.parametrize(
    ("fault", "model", "layout", "tensor"),
    [
        ("backward-all-reduce-missing", "puzzle", "tp2-pp1", "model.layers.0."),
        ("sequence-parallel-norm-gradients", "nano-4b", "tp2-pp1-sp", "norm.weight"),
        ("tied-gradients-not-summed", "tied", "tp2-pp2", "model.embed_tokens.weight"),
    ],
)
def test_a_gradient_that_is_not_summed_is_found(
    bench: Bench, fault: str, model: str, layout: str, tensor: str
) -> None:
    """No logits show these; the place names the tensor and where Megatron keeps the element."""
    found = finding(bench, model, layout, fault=fault)
    assert not found.passed
    assert found.value is not None
    assert found.value > 1000
    assert tensor in found.places[0]
    assert "; in " in found.places[0]


def test_half_a_gradient_does_not_pass_for_rounding_in_bfloat16(bench: Bench) -> None:
    """The tied embedding's is small beside others', and 88 % wrong without the other stage's."""
    found = finding(bench, "tied", "tp1-pp2", dtype="bfloat16", fault="tied-gradients-not-summed")
    assert not found.passed
    assert "model.embed_tokens.weight" in found.places[0]


def test_a_wrong_reference_is_named_as_the_odd_one_out(bench: Bench) -> None:
    """Its final norm is off by a thousandth: every gradient of it is."""
    found = finding(bench, "tied", "tp1-pp1", fault="reference-norm-scaled")
    assert not found.passed
    assert found.summary.startswith("gradients.reference_error: FAILED")
    assert found.places[0].endswith("the reference's gradients are wrong")
