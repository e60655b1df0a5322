"""Megatron-Core, a segment at a time: real one-block parts, filled through the bridge's tilings."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import distributed

from bridge.errors import PlanError
from bridge.loading import tiling_from_megatron
from bridge.parameters import EMBEDDING_ROW, OUTPUT_ROW, Parameter, parameters
from bridge.spec import BlockSpec, ModelSpec, NoOp, ParallelLayout, SwiGLU
from bridge.storage.source import TensorSource
from bridge.tiling import Box, Tile, Tiling
from harness.hooks import Fault
from harness.probes import Probe
from harness.streaming.arena import Arena
from harness.streaming.reading import HeldSource, fill
from harness.streaming.reference import plain
from harness.streaming.segments import Segment

Array = np.ndarray[Any, np.dtype[Any]]
DeviceName = Literal["cpu", "cuda"]
_ONE_RANK = ParallelLayout(num_layers_per_stage=(1,), make_vocab_size_divisible_by=1)


@contextlib.contextmanager
def one_rank(device: DeviceName) -> Iterator[torch.device]:
    """Make this process Megatron-Core's only rank, as long as the context lasts."""
    from bridge import platform

    platform.prepare(device)  # before an import of Megatron-Core can look for GPUs
    with _quiet():
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs  # noqa: F401

        import bridge.model  # noqa: F401

    store = distributed.HashStore()  # type: ignore[attr-defined]  # torch exports it untyped
    found = platform.initialize(0, 1, _ONE_RANK, store=store, device=device)
    try:
        yield found
    finally:
        platform.finalize()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What Megatron-Core and its optional packages announce is no news here."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


class SegmentTilings:
    """Which elements of the weights a segment of Megatron is made of, by the bridge's own table.

    Args:
        spec: What the bridge takes the model for.
        checkpoint: A Megatron checkpoint that is read instead of the Hugging Face one.
    """

    def __init__(self, spec: ModelSpec, checkpoint: TensorSource | None = None) -> None:
        self._spec, self._checkpoint = spec, checkpoint
        self._table = parameters(spec, padded_vocab_size=spec.padded_vocab_size(1))

    def names(self, segment: Segment) -> list[str]:
        """The parameters of a segment, in the order of the table."""
        if segment.part == "embedding":
            return [EMBEDDING_ROW.name]
        if segment.part == "head":
            tied = self._spec.share_embeddings_and_output_weights
            return ["decoder.final_layernorm.weight", (EMBEDDING_ROW if tied else OUTPUT_ROW).name]
        prefix = f"decoder.layers.{segment.layer_idx}."
        part = "self_attention." if segment.part == "attention" else "mlp."
        return [name for name in self._table if name.startswith(prefix + part)]

    def tiling(self, name: str, segment: Segment) -> Tiling:
        """The tiling of the part of a parameter that a segment has.

        Raises:
            PlanError: BR400, the table has no such parameter.
        """
        parameter = self._table.get(name)
        if parameter is None:
            raise PlanError("the table has no such parameter", where=name)
        whole = parameter.tiling
        if self._checkpoint is not None:
            whole, _ = tiling_from_megatron(parameter, self._spec, self._checkpoint)
        boxes = _boxes(parameter, segment)
        return whole.restrict(boxes, axis=parameter.tp_axis or 0)

    def whole_tiles(self, name: str, segment: Segment) -> list[Tile]:
        """The same tiles of Hugging Face tensors, in the coordinates of the whole parameter."""
        parameter = self._table[name]
        return [
            Tile(
                tile.source,
                common.relative_to(tile.target_box).shift(tile.source_box.starts),
                common,
            )
            for tile in parameter.tiling.tiles
            for box in _boxes(parameter, segment)
            if (common := tile.target_box.intersect(box)) is not None
        ]

    def wanted(self, segment: Segment) -> list[tuple[str, Box]]:
        """The boxes of the source that a segment reads."""
        return [
            (tile.source, tile.source_box)
            for name in self.names(segment)
            for tile in self.tiling(name, segment).tiles
            if tile.source is not None
        ]


def _boxes(parameter: Parameter, segment: Segment) -> Sequence[Box]:
    """A segment's share of a parameter: what a TP rank of as many ranks would hold, or rows."""
    if parameter.tp_axis is None:
        return parameter.shard_boxes(0, 1)
    if segment.part == "embedding":
        rest = parameter.shape[1:]
        return [Box.rows(box.starts[0], box.stops[0], rest) for _, box in segment.boxes]
    if segment.part == "attention" or (segment.part == "ffn" and segment.num_slices == 1):
        return parameter.shard_boxes(0, 1)
    found = []
    for whole in parameter.shard_boxes(0, 1):  # one box for each part that TP cuts by itself
        starts, stops, axis = list(whole.starts), list(whole.stops), parameter.tp_axis
        starts[axis], stops[axis] = starts[axis] + segment.start, starts[axis] + segment.stop
        found.append(Box(tuple(starts), tuple(stops)))
    return found


class Megatron:
    """Megatron-Core's GPTModel as a `Backend`, in a process that is its only rank.

    Args:
        spec: What the bridge takes the model for.
        mapping: Where its weights come from.
        dtype: torch's name of the dtype to hold and compute in.
        arena: Where the weights go.
        device: Where it is.
        fault: A deliberate mistake that its code is to have.
    """

    def __init__(
        self,
        spec: ModelSpec,
        mapping: SegmentTilings,
        *,
        dtype: str,
        arena: Arena,
        device: DeviceName,
        fault: Fault,
    ) -> None:
        self._spec, self._mapping = spec, mapping
        self._dtype, self._arena = dtype, arena
        self._kind: DeviceName = device
        self._fault = fault
        self._made: dict[object, Any] = {}
        self._part: Any = None
        self._tokens = np.empty(0, np.int64)

    def load(self, segment: Segment, source: HeldSource) -> None:
        """Build the block, or take one of this shape that was built before, and fill it."""
        self._arena.clear()
        if segment.layer_idx is not None and segment.layer_idx >= self._spec.num_layers:
            self._part = None
            return
        if segment.part == "embedding":
            self._tokens = np.array([box.starts[0] for _, box in segment.boxes])
        with self._faulty():
            self._part = self._built(segment)
            self._fill(segment, source)

    def _built(self, segment: Segment) -> Any:  # noqa: ANN401 - GPTModel, which ships no types
        from bridge.model import build_block

        block, size = BlockSpec(attention=NoOp(), ffn=NoOp()), 1
        if segment.layer_idx is not None:
            mine = self._spec.blocks[segment.layer_idx]
            if segment.part == "attention":
                block = replace(block, attention=mine.attention)
            else:
                block = replace(block, ffn=mine.ffn)
        if isinstance(block.ffn, SwiGLU) and segment.num_slices > 1:
            block = replace(block, ffn=SwiGLU(ffn_hidden_size=segment.stop - segment.start))
        if segment.part == "embedding":
            size = len(segment.boxes)
        if segment.part == "head":
            size = segment.stop - segment.start
        key = (segment.part, block, size)
        if key not in self._made:
            spec = replace(
                self._spec,
                blocks=(block,),
                heterogeneous_block_specs=True,
                share_embeddings_and_output_weights=False,
                vocab_size=size,
            )
            with _quiet():
                self._made[key] = build_block(
                    spec,
                    params_dtype=self._dtype,
                    layers="local",
                    device=self._kind,
                    pre_process=segment.part == "embedding",
                    post_process=segment.part == "head",
                )
        return self._made[key]

    def _fill(self, segment: Segment, source: HeldSource) -> None:
        from bridge.live_parameters import local_parameters

        wanted, held = self._mapping.names(segment), []
        for one in local_parameters([self._part], _ONE_RANK):
            name = one.name
            if name == OUTPUT_ROW.name:
                name = wanted[-1]  # a tied one is the embedding's
            elif segment.layer_idx is not None:
                name = name.replace("layers.0.", f"layers.{segment.layer_idx}.", 1)
            held.append(name)
            tiling = self._mapping.tiling(name, segment)
            if tiling.shape != tuple(one.tensor.shape):
                raise PlanError(
                    f"live shape {tuple(one.tensor.shape)}, the table's {tiling.shape}", where=name
                )
            tensor = self._arena.take(tiling.shape)
            fill(tensor, tiling, source)
            one.tensor.data = tensor
        if sorted(held) != sorted(wanted):
            odd = sorted(set(held) ^ set(wanted))
            raise PlanError(f"{len(odd)} parameters are only live or only planned", where=odd)

    @contextlib.contextmanager
    def _faulty(self) -> Iterator[None]:
        """The fault's code, where there is one, as a rank would run it."""
        from harness.ranks import RankContext

        hook = self._fault.hook
        if hook is None:
            yield
            return
        context = RankContext(rank=0, layout=_ONE_RANK, device=self._device)
        with hook(context):
            yield

    @property
    def _device(self) -> torch.device:
        from bridge.forward import current_device

        return current_device()

    def embed(self, probes: Sequence[Probe]) -> list[torch.Tensor]:
        """See `Backend`."""
        return [
            self._run(probe, ids=np.searchsorted(self._tokens, probe.input_ids)).transpose(0, 1)
            for probe in probes
        ]

    def attention(
        self, states: Sequence[torch.Tensor], probes: Sequence[Probe]
    ) -> list[torch.Tensor]:
        """See `Backend`."""
        return self._layer(states, probes)

    def ffn(self, states: Sequence[torch.Tensor], probes: Sequence[Probe]) -> list[torch.Tensor]:
        """See `Backend`."""
        return self._layer(states, probes)

    def _layer(self, states: Sequence[torch.Tensor], probes: Sequence[Probe]) -> list[torch.Tensor]:
        if self._part is None:
            return list(states)  # a block that the spec lacks adds nothing
        return [
            self._run(probe, hidden=state).transpose(0, 1)
            for state, probe in zip(states, probes, strict=True)
        ]

    def ffn_slice(self, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Backend`: what a TP rank with this share of the width would put into the sum."""
        if self._part is None:
            return [torch.zeros_like(state, dtype=torch.float32) for state in states]
        (layer,) = self._part.decoder.layers
        found = []
        with self._faulty(), torch.no_grad():
            for state in states:
                hidden = layer.pre_mlp_layernorm(state.transpose(0, 1).contiguous())
                output, _ = layer.mlp(hidden)
                found.append(output.transpose(0, 1).float())
        return found

    def added(self, state: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """See `Backend`."""
        return state + change.to(state.dtype)

    def head(self, states: Sequence[torch.Tensor], probes: Sequence[Probe]) -> list[Array]:
        """See `Backend`."""
        return [
            plain(self._run(probe, hidden=state))
            for state, probe in zip(states, probes, strict=True)
        ]

    def _run(
        self, probe: Probe, *, ids: Array | None = None, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        from bridge import forward

        shape = probe.input_ids.shape
        tokens = torch.from_numpy(np.zeros(shape, np.int64) if ids is None else ids)
        positions = torch.from_numpy(probe.position_ids)
        with self._faulty():
            return forward.forward_part(
                self._part,
                tokens.to(self._device),
                positions.to(self._device),
                hidden=None if hidden is None else hidden.transpose(0, 1).contiguous(),
            )

    def plain(self, state: torch.Tensor) -> Array:
        """See `Backend`."""
        return plain(state)

    def taken(self, state: Array) -> torch.Tensor:
        """See `Backend`."""
        dtype = getattr(torch, self._dtype)
        return torch.from_numpy(state).to(device=self._device, dtype=dtype)
