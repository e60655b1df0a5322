"""Gradient parity: loss and gradients of Megatron and the reference, judged against the oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from bridge.parameters import hf_tensors
from bridge.plan import Plan
from harness.bench import Bench
from harness.compare import Finding
from harness.gradients import (
    Assembled,
    TensorError,
    assemble,
    loss_excess,
    reference_error,
    tensor_errors,
)
from harness.live_gradients import gradients
from harness.metrics import ulp_of_one
from harness.stored import in_megatron
from harness.suite import Case

EXCESS: Final = "gradients.excess"
LOSS: Final = "gradients.loss"
REFERENCE_ERROR: Final = "gradients.reference_error"
_MAX_LISTED: Final = 20


def run(case: Case, bench: Bench) -> Finding:
    """Judge the loss and every tensor's gradient, on the short probe."""
    request, probe = bench.request(case), bench.probe(case, "short")
    ranks = bench.run(case, request.layout, gradients, request, probe.input_ids, probe.position_ids)
    with bench.fault.changed_code():
        assembled = assemble(ranks, hf_tensors(request.spec))
    return _judge(case, bench, assembled)


def _judge(case: Case, bench: Bench, assembled: Assembled) -> Finding:
    truth, reference = bench.oracle_gradients(case), bench.reference_gradients(case)
    on_reference, on_loss, on_excess = (
        bench.limits(case).get(name, case.dtype) for name in (REFERENCE_ERROR, LOSS, EXCESS)
    )
    errors, problems = tensor_errors(
        assembled.copies, reference.gradients, truth.gradients, floor=on_excess.floor
    )
    problems = [*assembled.problems, *problems]
    reference_ulp = reference_error(errors) / ulp_of_one(case.dtype)
    loss = loss_excess(
        assembled.losses,
        reference.loss,
        truth.loss,
        scale=max(truth.loss, truth.logits_rms),
        floor=on_loss.floor,
    )
    worst = errors[0].excess if errors else math.nan
    # The reference first: where it is wrong, it is the wrong measure for everything else.
    verdicts = (
        on_reference.verdict(reference_ulp, problems=tuple(problems)),
        on_loss.verdict(loss),
        on_excess.verdict(worst),
    )
    failed = [verdict for verdict in verdicts if not verdict.passed]
    places: list[str] = []
    if failed:
        if not problems and failed[0].name == REFERENCE_ERROR:
            places.append(
                "the oracle disagrees with the reference: the reference's gradients are wrong"
            )
        places += problems[:_MAX_LISTED]
        beyond = [one for one in errors if not one.excess <= on_excess.limit]
        places += _places(case, bench, beyond[:_MAX_LISTED])
    return Finding(
        passed=not failed,
        summary=failed[0].describe()
        if failed
        else f"{verdicts[-1].describe()}, the worst of {len(errors)} tensors",
        value=worst,
        limit=on_excess.limit,
        unit=on_excess.unit,
        places=tuple(places),
        details={
            "loss_nats_per_token": {
                "megatron": list(assembled.losses),
                "reference": reference.loss,
                "oracle": truth.loss,
                "excess": loss,
            },
            "reference_error_ulp": reference_ulp,
            "tensors": len(errors),
            "worst": [_plain(one) for one in errors[:_MAX_LISTED]],
            "ranks_disagree_in_some_bits": list(assembled.unequal[:_MAX_LISTED]),
            "problems": problems[:_MAX_LISTED],
        },
    )


def _places(case: Case, bench: Bench, errors: Sequence[TensorError]) -> list[str]:
    request = bench.request(case)
    layout = request.layout
    with bench.fault.changed_code():
        padded = request.spec.padded_vocab_size(
            layout.tensor_model_parallel_size,
            make_vocab_size_divisible_by=layout.make_vocab_size_divisible_by,
        )
        plan = Plan(request.spec, padded)
        return [
            f"{one.name}: {one.excess:.3g} times the reference's error, which is "
            f"{one.reference / one.scale if one.scale else math.inf:.2g} of its gradient; worst at "
            f"{list(one.worst)}: {one.ours:.6g}, should be {one.truth:.6g}; "
            f"{in_megatron(plan, one.name, one.worst)}"
            for one in errors
        ]


def _plain(error: TensorError) -> dict[str, Any]:
    return asdict(error) | {"worst": list(error.worst)}
