"""What happens inside rank processes: real Megatron models, built, filled, run and looked at.

Every function here takes a `RankContext` and plain data, and returns plain data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bridge.spec import ModelSpec, ParallelLayout
from harness.ranks import RankContext

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest:
    """Which model a rank is to have, and where its weights are.

    Args:
        spec: What the bridge takes the model for.
        layout: How it is cut.
        params_dtype: What it computes in.
        kind: Format of `path`.
        path: Checkpoint directory.
        device: Where it lives.
        variant: The fault it is built under; models of different faults are different models.
    """

    spec: ModelSpec
    layout: ParallelLayout
    params_dtype: str
    kind: Literal["hf", "megatron"]
    path: Path
    device: Literal["cpu", "cuda"] = "cpu"
    variant: str = "healthy"


def build(request: ModelRequest) -> list[Any]:
    """The calling rank's model parts, weights uninitialised."""
    from bridge.model import build_model

    # Local layers on every device: Transformer Engine computes float32 in TF32 unless told not to.
    return build_model(
        request.spec,
        request.layout,
        params_dtype=request.params_dtype,
        layers="local",
        device=request.device,
    )


def fill(parts: list[Any], request: ModelRequest) -> None:
    """Load the request's checkpoint into model parts."""
    from bridge.model import load_hf, load_megatron
    from bridge.storage.megatron import MegatronSource
    from bridge.storage.safetensors import SafetensorsSource

    if request.kind == "hf":
        with SafetensorsSource(request.path) as hf:
            load_hf(parts, request.spec, request.layout, hf)
    else:
        with MegatronSource(request.path) as megatron:
            load_megatron(parts, request.spec, request.layout, megatron)


def model(context: RankContext, request: ModelRequest) -> list[Any]:
    """The model of a request, built and filled once as long as the layout lasts."""

    def build_and_fill() -> list[Any]:
        parts = build(request)
        fill(parts, request)
        return parts

    return context.cached(request, build_and_fill)


def logits(
    context: RankContext, request: ModelRequest, input_ids: Array, position_ids: Array
) -> Array | None:
    """Logits, (batch, seq, vocab_size) in float32 or float64, from rank 0; None from the others."""
    import torch

    from bridge.forward import forward

    parts = model(context, request)
    with torch.no_grad():
        found = forward(
            parts,
            request.spec,
            request.layout,
            torch.from_numpy(input_ids),
            torch.from_numpy(position_ids),
        )
    if context.rank != 0:
        return None
    return (found if found.dtype == torch.float64 else found.float()).cpu().numpy()


def rope_tables(
    context: RankContext, request: ModelRequest, position_ids: Array
) -> list[dict[str, Array]]:
    """What each model part rotates by: `inv_freq`, and the angles at some positions.

    Angles are (seq, kv_channels / 2), float32, taken from the output that attention is given.
    """
    import torch

    found = []
    for part in model(context, request):
        rotary = part.rotary_pos_emb
        rotary.position_ids = torch.from_numpy(position_ids).to(rotary.inv_freq.device)
        try:
            angles = rotary(len(position_ids))
        finally:
            rotary.position_ids = None
        angles = angles[:, 0, 0, : angles.shape[-1] // 2].cpu().numpy()
        found.append({"inv_freq": rotary.inv_freq.cpu().numpy(), "angles": angles})
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveTensor:
    """One parameter as a rank holds it, named by Megatron's own modules.

    Args:
        name: `decoder.layers.N.` and the rest of the live name, N the layer's index over the whole
            model as Megatron's `layer_number` has it.
        tensor: The parameter.
    """

    name: str
    tensor: Any


def live_tensors(parts: list[Any]) -> list[LiveTensor]:
    """Every parameter of the calling rank. Shares nothing with `bridge.model`."""
    found = []
    for part in parts:
        for name, tensor in part.named_parameters():
            head, _, rest = name.partition("decoder.layers.")
            full = name
            if not head and rest:
                local, _, leaf = rest.partition(".")
                layer = part.decoder.layers[int(local)]
                full = f"decoder.layers.{layer.layer_number - 1}.{leaf}"
            found.append(LiveTensor(name=full, tensor=tensor))
    return found


def load_by_megatron(
    context: RankContext, request: ModelRequest, checkpoint: Path
) -> tuple[list[str], int]:
    """Load a checkpoint with Megatron-Core's own loader, strict, and compare with the request's.

    Args:
        context: This rank.
        request: The model as the bridge loads it.
        checkpoint: Iteration directory of a `torch_dist`.

    Returns:
        Every difference in words, and how many elements were compared.
    """
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from harness.compare import first_difference, words_of

    ours = model(context, request)
    theirs = build(request)
    for part in theirs:
        for parameter in part.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
    # Models of several parts are stored as several state dicts over one set of keys.
    wanted = {f"model{index}": part.sharded_state_dict() for index, part in enumerate(theirs)}
    loaded = dist_checkpointing.load(
        wanted, str(checkpoint), strict=StrictHandling.RAISE_UNEXPECTED
    )
    for index, part in enumerate(theirs):
        part.load_state_dict(loaded[f"model{index}"], strict=True)
    problems, compared = [], 0
    for mine, other in zip(live_tensors(ours), live_tensors(theirs), strict=True):
        compared += mine.tensor.numel()
        found = first_difference(words_of(other.tensor), words_of(mine.tensor))
        if found is not None:
            at, count = found
            problems.append(
                f"rank {context.rank}: {mine.name}{list(at)}: {count} elements differ between "
                "Megatron-Core's loader and ours, this one first"
            )
    return problems, compared


def save_by_megatron(context: RankContext, request: ModelRequest, checkpoint: Path) -> None:
    """Save the model of a request with Megatron-Core, as training does, under a new root."""
    from megatron.core import dist_checkpointing

    iteration = checkpoint / "iter_0000001"
    if context.rank == 0:
        iteration.mkdir(parents=True)
        (checkpoint / "latest_checkpointed_iteration.txt").write_text("1")
    _barrier()
    state: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": 1}
    for index, part in enumerate(model(context, request)):
        state[f"model{index}"] = part.sharded_state_dict()
    dist_checkpointing.save(state, str(iteration))
    _barrier()


def _barrier() -> None:
    import torch

    torch.distributed.barrier()


def summed(results: list[tuple[list[str], int]]) -> tuple[list[str], int]:
    """Problems and counts of all ranks together."""
    return [one for problems, _ in results for one in problems], sum(n for _, n in results)
