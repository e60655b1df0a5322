"""A Megatron checkpoint against the Hugging Face one: every element, bit by bit."""

from __future__ import annotations

import dataclasses
import math

from bridge.errors import BridgeError, ConfigError
from bridge.megatron_args import spec_from_checkpoint_args
from bridge.parameters import EMBEDDING_ROW
from bridge.plan import Plan, account_for
from bridge.spec import ModelSpec
from bridge.storage.megatron import MegatronSource
from bridge.storage.safetensors import SafetensorsSource
from bridge.transfer import TransferLimits, compare
from harness.bench import Bench
from harness.checks.round_trip import in_megatron
from harness.compare import Finding, exact
from harness.suite import Case

_FREE = ("params_dtype", "max_position_embeddings")
"""What training may change without changing what the weights mean."""


def run(case: Case, bench: Bench) -> Finding:
    """Compare the user's Megatron checkpoint, or our own conversion, with the source."""
    hf, spec = bench.checkpoint(case), bench.spec(case)
    megatron = bench.subject(case.model).megatron or bench.converted(case)
    with MegatronSource(megatron) as actual, SafetensorsSource(hf) as expected:
        with bench.fault.changed_code():
            padded = actual.tensors.get(EMBEDDING_ROW.name)
            plan = Plan(spec, padded.shape[0] if padded is not None else spec.vocab_size)
            problems = _arguments(actual, spec)
            try:
                account_for(plan.hf_shapes, expected.tensors, where=str(hf))
                account_for(plan.mcore_shapes, actual.tensors, where=str(megatron))
            except BridgeError as error:
                problems += [error.message, *error.where]
                return exact(problems, compared=0, what="elements")
            digests = compare(
                expected,
                actual,
                plan.mcore_to_hf,
                limits=TransferLimits(),
                advance=lambda _nbytes: None,
            )
        for digest in digests:
            if digest.first_difference is not None:
                tile = in_megatron(plan, digest.name, digest.first_difference)
                problems.append(
                    f"{digest.name}{list(digest.first_difference)}: {digest.num_different} "
                    f"elements differ, this one first; {tile}"
                )
    elements = sum(math.prod(shape) for shape in plan.hf_shapes.values())
    return exact(problems, compared=elements, what="elements, bit for bit")


def _arguments(source: MegatronSource, spec: ModelSpec) -> list[str]:
    """What the checkpoint says of its own model, where it says anything."""
    if source.args is None:
        return []
    args = dict(source.args)
    vocab_size = spec.vocab_size if args.get("vocab_size") is None else None
    rope = spec.rope if args.get("use_rope_scaling") is None else None
    try:
        said = spec_from_checkpoint_args(
            args, vocab_size=vocab_size, rope=rope, where=source.args_where
        )
    except ConfigError as error:
        return [f"{source.args_where}: {error.message}", *error.where]
    return [
        f"{source.args_where}: {field.name} is {getattr(said, field.name)}, "
        f"config.json has {getattr(spec, field.name)}"
        for field in dataclasses.fields(spec)
        if field.name not in _FREE and getattr(said, field.name) != getattr(spec, field.name)
    ]
