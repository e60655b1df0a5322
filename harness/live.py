"""What happens inside rank processes: real Megatron models, built, filled, run and looked at.

Every function here takes a `RankContext` and plain data, and returns plain data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from bridge.spec import ModelSpec, ParallelLayout
from harness.ranks import RankContext

if TYPE_CHECKING:
    from bridge.megatron_config import AttentionBackend

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest:
    """Which model a rank is to have, and where its weights are.

    Args:
        spec: What the bridge takes the model for.
        layout: How it is cut.
        params_dtype: What it computes in.
        kind: Format of `path`.
        path: Checkpoint directory; of "synthetic" weights the configuration.
        seed: Which synthetic weights.
        carry: Unknown fields of that configuration which the user lets through.
        device: Where it lives.
        layers: Of which kind, one of `harness.suite.LAYERS`.
        variant: The fault it is built under; models of different faults are different models.
    """

    spec: ModelSpec
    layout: ParallelLayout
    params_dtype: str
    kind: Literal["hf", "megatron", "synthetic"]
    path: Path
    seed: int = 0
    carry: tuple[str, ...] = ()
    device: Literal["cpu", "cuda"] = "cpu"
    layers: str = "local"
    variant: str = "healthy"


def build(request: ModelRequest) -> list[Any]:
    """The calling rank's model parts, weights uninitialised."""
    from bridge.model import build_model

    kind, _, attention = request.layers.partition("-")
    return build_model(
        request.spec,
        request.layout,
        params_dtype=request.params_dtype,
        layers="te" if kind == "te" else "local",
        attention_backend=cast("AttentionBackend", attention or "auto"),
        device=request.device,
    )


def fill(parts: list[Any], request: ModelRequest) -> None:
    """Load the request's checkpoint into model parts."""
    from bridge.live_parameters import load_hf, load_megatron
    from bridge.storage.megatron import MegatronSource
    from bridge.storage.safetensors import SafetensorsSource

    if request.kind == "hf":
        with SafetensorsSource(request.path) as hf:
            load_hf(parts, request.spec, request.layout, hf)
    elif request.kind == "synthetic":
        from bridge.convert import read_spec
        from bridge.storage.synthetic import SyntheticSource

        device = "cuda" if request.device == "cuda" else None
        # The model's own weights: a fault may have changed `request.spec`.
        own = read_spec(request.path, carry=request.carry)
        with SyntheticSource(own, seed=request.seed, device=device) as drawn:
            load_hf(parts, request.spec, request.layout, drawn)
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
    context: RankContext, request: ModelRequest, input_ids: Array, position_ids: Array | None
) -> Array | None:
    """Logits, (batch, seq, vocab_size) in float32 or float64, from rank 0; None from the others.

    Args:
        context: This rank.
        request: The model.
        input_ids: (batch, seq).
        position_ids: (seq,); None leaves the model to count.
    """
    import torch

    from bridge.forward import forward

    parts = model(context, request)
    with torch.no_grad():
        found = forward(
            parts,
            request.spec,
            request.layout,
            torch.from_numpy(input_ids),
            None if position_ids is None else torch.from_numpy(position_ids),
        )
    if context.rank != 0:
        return None
    return (found if found.dtype == torch.float64 else found.float()).cpu().numpy()


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
    """Every parameter of the calling rank. Shares nothing with `bridge.live_parameters`."""
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
