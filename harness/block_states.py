"""Block by block: what the reference and the oracle make of a probe, and how far a model is off.

Two ways to look. Running free, each side continues from its own state, so an early mistake shows
everywhere after it. Teacher-forced, every block is given the reference's state, and the truth is
what the oracle's block makes of exactly that: the error that this block adds, and no other's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from harness import live_blocks, oracle
from harness.cores import oracle_cores
from harness.live_blocks import EMBEDDING, Gathered
from harness.metrics import Excess, excess, ulp_of_one
from harness.thresholds import Threshold, Thresholds, Verdict

if TYPE_CHECKING:
    from harness.bench import Bench
    from harness.suite import Case

Array = np.ndarray[Any, np.dtype[Any]]
FORCED_EXCESS: Final = "blocks.excess"
FREE_EXCESS: Final = "blocks.free_excess"
REFERENCE_ERROR: Final = "blocks.reference_error"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Witnesses:
    """What Megatron is judged by. Entry 0 is the embedding's, entry n + 1 that of block n.

    Attributes:
        model: The architecture as the oracle reads it.
        reference: The Hugging Face model's states, (batch, seq, hidden_size).
        reference_logits: And its logits.
        free: The oracle's own states, float64.
        forced: What the oracle makes of the reference's state before each block.
        forced_logits: And of its last state.
    """

    model: oracle.Architecture
    reference: Sequence[Array]
    reference_logits: Array
    free: Sequence[Array]
    forced: Sequence[Array]
    forced_logits: Array


def witnesses(case: Case, bench: Bench) -> Witnesses:
    """Run the reference and the oracle on the case's probe; `Bench.witnesses` keeps the result."""
    probe, config, weight = bench.probe(case), bench.truth_config(case), bench.oracle_weight(case)
    model = oracle.read_config(config)
    reference, logits = hf_states(bench.hf_model(case), probe.input_ids, probe.position_ids)
    free: list[Array] = []
    given = [state.astype(np.float64) for state in reference]
    with oracle_cores():
        oracle.forward(
            config, weight, probe.input_ids, probe.position_ids,
            capture=lambda _layer_idx, hidden: free.append(hidden),
        )  # fmt: skip
        positions = probe.position_ids.reshape(-1, probe.input_ids.shape[1])
        angles = oracle.rotary_angles(model, positions)
        forced = [
            oracle.block(hidden, angles, weight, model, layer_idx)
            for layer_idx, hidden in enumerate(given[:-1])
        ]
        forced_logits = oracle.head(given[-1], weight, model)
    return Witnesses(
        model=model,
        reference=reference,
        reference_logits=logits,
        free=free,
        forced=[free[0], *forced],
        forced_logits=forced_logits,
    )


def hf_states(model: Any, input_ids: Array, position_ids: Array) -> tuple[list[Array], Array]:  # noqa: ANN401 - transformers is not typed
    """States after the embedding and after each block of a transformers model, and its logits."""
    from harness.reference import hf_logits

    kept: dict[int, Array] = {}
    modules = {EMBEDDING: model.model.embed_tokens, **dict(enumerate(model.model.layers))}

    def keep(layer_idx: int, output: Any) -> None:  # noqa: ANN401 - tensors, bare or in a tuple
        state = output[0] if isinstance(output, tuple) else output
        wide = state if str(state.dtype) == "torch.float64" else state.float()
        kept[layer_idx] = wide.detach().clone().cpu().numpy()

    handles = [
        module.register_forward_hook(
            lambda _module, _args, output, layer_idx=layer_idx: keep(layer_idx, output)
        )
        for layer_idx, module in modules.items()
    ]
    try:
        logits = hf_logits(model, input_ids, position_ids)
    finally:
        for handle in handles:
            handle.remove()
    return [kept[layer_idx] for layer_idx in modules], logits


def megatron_states(case: Case, bench: Bench) -> Gathered:
    """Run Megatron on the case's probe, free and forced; `Bench.block_states` keeps the result."""
    probe, layout = bench.probe(case), bench.layout(case)
    ranks = bench.run(
        case, layout, live_blocks.states, bench.request(case), probe.input_ids,
        probe.position_ids, bench.witnesses(case).reference,
    )  # fmt: skip
    return live_blocks.gather(ranks, layout, probe.input_ids.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockJudgement:
    """One block, or the embedding, of the two models.

    Attributes:
        layer_idx: From 0; -1 is the embedding.
        kind: What it consists of.
        forced: Its own error, given the reference's state.
        free: The state after it, each side left to itself.
        reference_ulp: The reference's own error, given the same state.
        candidate_ulp: Megatron's.
        verdicts: On the reference, forced and free, in this order.
        tp_rank: Whose state is the worst where ranks that should agree do not; else None.
    """

    layer_idx: int
    kind: str
    forced: Excess
    free: Excess
    reference_ulp: float
    candidate_ulp: float
    verdicts: tuple[Verdict, Verdict, Verdict]
    tp_rank: int | None = None

    @property
    def name(self) -> str:
        """As in a sentence."""
        return "the embedding" if self.layer_idx == EMBEDDING else f"block {self.layer_idx}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, a row of a table or a point of a plot."""
        return {
            "layer_idx": self.layer_idx,
            "kind": self.kind,
            "teacher_excess": _number(self.forced.value),
            "free_excess": _number(self.free.value),
            "teacher_error": _number(self.candidate_ulp),
            "reference_error": _number(self.reference_ulp),
        }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def judge_blocks(
    found: Gathered, by: Witnesses, *, dtype: str, thresholds: Thresholds
) -> list[BlockJudgement]:
    """Judge the embedding and every block, in order; a block that no rank has run fails."""
    return [
        _judge(entry - 1, found, by, dtype=dtype, thresholds=thresholds)
        for entry in range(len(by.forced))
    ]


def _judge(
    layer_idx: int, found: Gathered, by: Witnesses, *, dtype: str, thresholds: Thresholds
) -> BlockJudgement:
    entry = layer_idx + 1
    # The embedding is given ids, so free and forced are one.
    forced = found.free if layer_idx == EMBEDDING else found.forced
    return judge_block(
        layer_idx,
        kind_of(by.model, layer_idx),
        reference=by.reference[entry],
        forced=(forced.get(layer_idx, []), by.forced[entry]),
        free=(found.free.get(layer_idx, []), by.free[entry]),
        dtype=dtype,
        thresholds=thresholds,
    )


def judge_block(
    layer_idx: int,
    kind: str,
    *,
    reference: Array,
    forced: tuple[Sequence[tuple[int, Array]], Array],
    free: tuple[Sequence[tuple[int, Array]], Array],
    dtype: str,
    thresholds: Thresholds,
) -> BlockJudgement:
    """Judge the state after one block; one that no rank has run fails.

    Args:
        layer_idx: From 0; -1 is the embedding.
        kind: What it consists of.
        reference: The reference's state, (batch, seq, hidden_size).
        forced: What Megatron makes of the reference's state before it, by TP rank where they
            differ, and what the oracle does.
        free: The same of each one's own state.
        dtype: What the models compute in.
        thresholds: Limits.
    """
    on_forced, on_free = (thresholds.get(name, dtype) for name in (FORCED_EXCESS, FREE_EXCESS))
    tp_rank, found = _worst(forced[0], reference, forced[1], on_forced)
    return judgement_of(
        layer_idx,
        kind,
        found,
        _worst(free[0], reference, free[1], on_free)[1],
        dtype=dtype,
        thresholds=thresholds,
        tp_rank=tp_rank if len(forced[0]) > 1 else None,
    )


def judgement_of(
    layer_idx: int,
    kind: str,
    forced: Excess,
    free: Excess,
    *,
    dtype: str,
    thresholds: Thresholds,
    tp_rank: int | None = None,
) -> BlockJudgement:
    """The verdicts on what was measured of a block; arguments are those of `BlockJudgement`."""
    on_forced, on_free, on_reference = (
        thresholds.get(name, dtype) for name in (FORCED_EXCESS, FREE_EXCESS, REFERENCE_ERROR)
    )
    unit = ulp_of_one(dtype)
    reference_ulp = forced.reference_error / forced.scale / unit
    return BlockJudgement(
        layer_idx=layer_idx,
        kind=kind,
        forced=forced,
        free=free,
        reference_ulp=reference_ulp,
        candidate_ulp=forced.candidate_error / forced.scale / unit,
        verdicts=(
            on_reference.verdict(reference_ulp, problems=forced.problems),
            on_forced.verdict(forced.value, problems=forced.problems),
            on_free.verdict(free.value, problems=free.problems),
        ),
        tp_rank=tp_rank,
    )


def _worst(
    states: Sequence[tuple[int, Array]], reference: Array, truth: Array, threshold: Threshold
) -> tuple[int, Excess]:
    """The state farthest from the truth, of those that ranks hold; one that is no number wins."""
    measured = [
        (tp_rank, excess(state, reference, truth, threshold.floor)) for tp_rank, state in states
    ]
    if not measured:
        return 0, Excess(problems=("no rank has run it",))
    return max(measured, key=lambda one: math.inf if one[1].problems else one[1].value)


def kind_of(model: oracle.Architecture, layer_idx: int) -> str:
    """What a block consists of: "attention with 2 query groups + SwiGLU 512"."""
    if layer_idx == EMBEDDING:
        return "embedding"
    if layer_idx >= len(model.blocks):
        return "final norm + output layer"
    return " + ".join(part_kind(part) for part in model.blocks[layer_idx])


def part_kind(part: oracle.Attention | oracle.Mlp | oracle.Replaced | oracle.Absent) -> str:
    """What one of the two parts of a block is: `linear`, `no-op`, `SwiGLU 512` ..."""
    match part:
        case oracle.Attention(num_query_groups=groups):
            return f"attention with {groups} query group{'s' if groups > 1 else ''}"
        case oracle.Mlp(ffn_hidden_size=width):
            return f"SwiGLU {width}"
        case oracle.Replaced():
            return "linear"
        case oracle.Absent():
            return "no-op"


def worst_token(measured: Excess) -> tuple[int, int] | None:
    """(batch, seq) of the largest error; None where nothing was measured."""
    errors = measured.candidate_by_position
    if measured.problems or not errors.size:
        return None
    batch, seq = np.unravel_index(int(errors.argmax()), errors.shape)
    return int(batch), int(seq)


def rows_of(judgements: Sequence[BlockJudgement]) -> list[Mapping[str, Any]]:
    """Plain data for evidence and plots."""
    return [one.to_dict() for one in judgements]
