"""What Megatron rotates by, and what comes out, judged inside the ranks.

Angles of every position would be 64 MiB and more on their way to the parent process, so a rank
compares them itself and sends back what differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from unittest import mock

import numpy as np

from harness import oracle
from harness.live import Array, ModelRequest, model
from harness.metrics import ulp_of_one
from harness.ranks import RankContext

Float32s = np.ndarray[Any, np.dtype[np.float32]]
_POSITIONS_AT_ONCE: Final = 1 << 14


@dataclass(slots=True, kw_only=True)
class Rotations:
    """What one rank found.

    Args:
        problems: Frequencies and angles that differ, calls that are missing, in words.
        compared: Frequencies and angles that were held against the expected ones.
        rotated: Pairs of channels of queries and keys that were held against the exact rotation.
        error_ulp: The farthest of them, in ulp of the model's dtype times the length of the pair.
        where: Which one that is.
    """

    problems: list[str] = field(default_factory=list)
    compared: int = 0
    rotated: int = 0
    error_ulp: float = 0.0
    where: str = ""


@dataclass(frozen=True, slots=True)
class _Call:
    """One rotation as attention asked for it: states (seq, batch, heads, kv_channels)."""

    states: Array
    rotated: Array


def rotations(
    context: RankContext,
    request: ModelRequest,
    frequencies: Float32s,
    max_position_embeddings: int,
    input_ids: Array,
    position_ids: Array,
) -> Rotations:
    """Check every model part of the calling rank: frequencies, angles, rotated vectors.

    Args:
        context: This rank.
        request: The model.
        frequencies: What `inv_freq` has to be, bit for bit, (kv_channels / 2,).
        max_position_embeddings: Angles are compared at every position below it.
        input_ids: (batch, seq), run through the model so that attention rotates.
        position_ids: (seq,), where these tokens are.
    """
    found = Rotations()
    parts = model(context, request)
    for vp_stage, part in enumerate(parts):
        _check_tables(
            found, f"rank {context.rank} part {vp_stage}", part.rotary_pos_emb,
            frequencies, max_position_embeddings,
        )  # fmt: skip
    calls = _recorded(parts, request, input_ids, position_ids)
    wanted = 2 * sum(_num_attentions(part) for part in parts)
    if len(calls) != wanted:
        found.problems.append(
            f"rank {context.rank}: attention rotated {len(calls)} times, queries and keys of its "
            f"layers make {wanted}"
        )
    angles = _angles(position_ids, frequencies).astype(np.float64)
    for number, call in enumerate(calls):
        name = "queries" if number % 2 == 0 else "keys"
        which = f"rank {context.rank}: {name} of attention {number // 2} of the rank"
        _check_call(found, which, call, angles, position_ids, ulp_of_one(request.params_dtype))
    return found


def _angles(position_ids: Array, frequencies: Float32s) -> Float32s:
    """Float32 products, (seq, kv_channels / 2): by definition, see `harness.oracle`."""
    product: Float32s = position_ids.astype(np.float32)[:, None] * frequencies
    return product


def _check_tables(
    found: Rotations,
    where: str,
    rotary: Any,  # noqa: ANN401 - bridge.rotary's module
    frequencies: Float32s,
    max_position_embeddings: int,
) -> None:
    """Compare `inv_freq`, and the angles of all positions, given and left to be counted."""
    import torch

    held: Float32s = rotary.inv_freq.cpu().numpy()
    found.compared += held.size
    found.problems += differences(f"{where} inv_freq", held, frequencies, "the expected")
    worst: dict[str, str] = {}
    for start in range(0, max_position_embeddings, _POSITIONS_AT_ONCE):
        positions = np.arange(
            start, min(start + _POSITIONS_AT_ONCE, max_position_embeddings), dtype=np.int64
        )
        half = _angles(positions, frequencies)
        expected = np.concatenate([half, half], axis=1)  # channel i turns with i + half
        counted = rotary(len(positions), offset=start)
        rotary.position_ids = torch.from_numpy(positions).to(rotary.inv_freq.device)
        try:
            given = rotary(len(positions))
        finally:
            rotary.position_ids = None
        for name, angles in (("counted", counted), ("given", given)):
            held = angles[:, 0, 0].cpu().numpy()
            found.compared += held.size
            label = f"{where} angle [position, channel], positions {name}"
            for problem in differences(label, held, expected, "the formula's", rows=positions):
                worst[name] = problem  # the last one stays: errors grow with the position
    found.problems += worst.values()


def _num_attentions(part: Any) -> int:  # noqa: ANN401 - GPTModel, which ships no types
    from megatron.core.transformer.attention import Attention

    return sum(isinstance(module, Attention) for module in part.modules())


def _recorded(
    parts: Sequence[Any], request: ModelRequest, input_ids: Array, position_ids: Array
) -> list[_Call]:
    """Run the model and note every rotation, exactly as attention calls for it."""
    import torch

    from bridge.forward import forward

    with _recording() as calls, torch.no_grad():
        forward(
            parts,
            request.spec,
            request.layout,
            torch.from_numpy(input_ids),
            torch.from_numpy(position_ids),
        )
    return calls


@contextlib.contextmanager
def _recording() -> Iterator[list[_Call]]:
    from megatron.core.transformer import attention

    healthy = attention.apply_rotary_pos_emb
    calls: list[_Call] = []

    def record(states: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - Megatron's own
        before = states.detach().double().cpu().numpy().copy()
        rotated = healthy(states, *args, **kwargs)
        calls.append(_Call(before, rotated.detach().double().cpu().numpy()))
        return rotated

    with mock.patch.object(attention, "apply_rotary_pos_emb", record):
        yield calls


def _check_call(
    found: Rotations, which: str, call: _Call, angles: Array, position_ids: Array, unit: float
) -> None:
    """Hold one call against the exact rotation; what sequence parallelism pads is left out."""
    length = len(position_ids)
    if call.rotated.shape != call.states.shape or call.states.shape[0] < length:
        found.problems.append(
            f"{which}: {call.states.shape} became {call.rotated.shape} for {length} tokens"
        )
        return
    states, rotated = (x[:length].transpose(1, 2, 0, 3) for x in (call.states, call.rotated))
    error = rotation_error(states, rotated, angles, unit=unit)
    found.rotated += error.size
    worst = np.unravel_index(int(error.argmax()), error.shape)
    value = float(error[worst])
    if value > found.error_ulp:
        batch, head, seq, channel = (int(i) for i in worst)
        found.error_ulp = value
        found.where = (
            f"{which}, sequence {batch}, head {head}, position {int(position_ids[seq])}, "
            f"channels {channel} and {channel + error.shape[-1]}"
        )


def rotation_error(states: Array, rotated: Array, angles: Array, *, unit: float) -> Array:
    """How far each rotated pair of channels is from the exact one.

    Args:
        states: (batch, heads, seq, kv_channels), float64.
        rotated: Same shape.
        angles: (seq, kv_channels / 2), float64.
        unit: One ulp of 1.0 of what the model computes in.

    Returns:
        (batch, heads, seq, kv_channels / 2), in `unit` times the length of the pair; never NaN.
    """
    half = states.shape[-1] // 2
    difference = rotated - oracle.rotate(states, angles[None, None])
    distance = np.hypot(difference[..., :half], difference[..., half:])
    length = np.hypot(states[..., :half], states[..., half:]) * unit
    with np.errstate(divide="ignore", invalid="ignore"):
        error: Array = np.where(distance == 0, 0.0, distance / length)
    error[np.isnan(error)] = np.inf  # worse than any number, and it compares like one
    return error


def differences(
    name: str,
    ours: Float32s,
    theirs: Float32s,
    whose: str,
    *,
    rows: np.ndarray[Any, np.dtype[np.int64]] | None = None,
) -> list[str]:
    """One line for two tables that differ in any bit, the largest difference first."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return [f"{name}: {ours.shape} {ours.dtype}, {whose} {theirs.shape} {theirs.dtype}"]
    different = ours.view(np.uint32) != theirs.view(np.uint32)
    if not different.any():
        return []
    gap = np.abs(ours.astype(np.float64) - theirs)
    index = np.unravel_index(int(np.where(different, gap, -1).argmax()), ours.shape)
    at: list[int] = [int(i) for i in index]
    if rows is not None:
        at[0] = int(rows[at[0]])
    values = f"{ours[index]:.9g}, {whose} {theirs[index]:.9g}"
    return [f"{name}{at}: {values}; {int(different.sum())} of {ours.size} differ"]
