"""The oracle, a segment at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from bridge.tiling import Box
from harness import oracle
from harness.oracle import Absent, Architecture, Attention, Mlp
from harness.probes import Probe
from harness.streaming.reading import HeldRows, HeldSource
from harness.streaming.segments import Segment, slices
from harness.toys import hf_tensors

Array = np.ndarray[Any, np.dtype[Any]]


class Truth:
    """`harness.oracle` as a `Backend`, in float64.

    Sums over a feed-forward's width and over query groups are cut into parts for threads, as tensor
    parallelism cuts them, and so are rows of the other matrices: the oracle is called for each.

    Args:
        model: The architecture.
        threads: That compute.
    """

    def __init__(self, model: Architecture, *, threads: int = 1) -> None:
        self._model, self._threads = model, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="oracle-part")
        self._shapes = hf_tensors(model)
        self._boxes: dict[str, Box] = {}
        self._source: HeldSource | None = None
        self._segment = Segment(part="embedding")

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def load(self, segment: Segment, source: HeldSource) -> None:
        """Nothing is copied: rows are converted as the sums want them."""
        self._segment, self._source = segment, source
        # Of the embedding's rows any may be asked for, by their place in the whole.
        self._boxes = {} if segment.part == "embedding" else dict(segment.boxes)

    def embed(self, probes: Sequence[Probe]) -> list[Array]:
        """See `Backend`."""
        weight = self._weight({})
        return [oracle.embed(weight, self._model, one.input_ids) for one in probes]

    def attention(self, states: Sequence[Array], probes: Sequence[Probe]) -> list[Array]:
        """See `Backend`. The states of one probe share a pass over the weights."""
        kind = self._model.blocks[self._layer_idx][0]
        if isinstance(kind, Absent):
            return list(states)
        if not isinstance(kind, Attention):
            return self._replaced(states, "input_layernorm", "self_attn.linear_attn")
        found: dict[int, Array] = {}
        for probe in {id(one): one for one in probes}.values():
            places = [place for place, one in enumerate(probes) if one is probe]
            hidden = np.concatenate([states[place] for place in places])
            angles = oracle.rotary_angles(self._model, probe.position_ids[None])
            changed = hidden + self._attention(hidden, angles, kind.num_query_groups)
            found |= dict(zip(places, np.split(changed, len(places)), strict=True))
        return [found[place] for place in range(len(states))]

    def _attention(self, hidden: Array, angles: Array, groups: int) -> Array:
        model, prefix = self._model, f"{self._prefix}.self_attn"
        normed = self._normed(hidden, "input_layernorm")
        rows = model.num_attention_heads // groups * model.kv_channels

        def some(first: int, last: int) -> Array:
            """What the query groups from first to last add."""
            count = last - first
            heads = model.num_attention_heads // groups * count
            names = {"q_proj": (0, rows), "k_proj": (0, model.kv_channels),
                     "v_proj": (0, model.kv_channels), "o_proj": (1, rows)}  # fmt: skip
            weight = self._weight(
                {
                    f"{prefix}.{name}.weight": (axis, first * size, last * size)
                    for name, (axis, size) in names.items()
                }
            )
            fewer = replace(model, num_attention_heads=heads)
            return oracle.attention(
                normed, angles, weight, prefix=prefix, model=fewer, groups=count
            )

        return _sum(self._in_parts(groups, some))

    def ffn(self, states: Sequence[Array], _probes: Sequence[Probe]) -> list[Array]:
        """See `Backend`."""
        kind = self._model.blocks[self._layer_idx][1]
        if isinstance(kind, Absent):
            return list(states)
        if not isinstance(kind, Mlp):
            return self._replaced(states, "post_attention_layernorm", "mlp.linear_mlp")
        pairs = zip(states, self._mlp(states, kind.ffn_hidden_size), strict=True)
        return [self.added(state, change) for state, change in pairs]

    def ffn_slice(self, states: Sequence[Array]) -> list[Array]:
        """See `Backend`."""
        return self._mlp(states, self._segment.stop - self._segment.start)

    def _mlp(self, states: Sequence[Array], width: int) -> list[Array]:
        prefix = f"{self._prefix}.mlp"
        normed = self._normed(_tokens(states), "post_attention_layernorm")

        def some(first: int, last: int) -> Array:
            """What the units from first to last add."""
            names = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
            weight = self._weight(
                {f"{prefix}.{name}.weight": (axis, first, last) for name, axis in names.items()}
            )
            return oracle.mlp(normed, weight, prefix, last - first)

        return _apart(_sum(self._in_parts(width, some)), states)

    def added(self, state: Array, change: Array) -> Array:
        """See `Backend`."""
        found: Array = state + change
        return found

    def head(self, states: Sequence[Array], _probes: Sequence[Probe]) -> list[Array]:
        """See `Backend`."""
        model, weight = self._model, self._weight({})
        epsilon = model.layernorm_epsilon
        normed = oracle.rms_norm(_tokens(states), weight, "model.norm.weight", epsilon)
        name = "model.embed_tokens.weight" if model.tied else "lm_head.weight"
        return _apart(self._linear(normed, name), states)

    def plain(self, state: Array) -> Array:
        """See `Backend`."""
        return state

    def taken(self, state: Array) -> Array:
        """See `Backend`."""
        return state.astype(np.float64)

    @property
    def _layer_idx(self) -> int:
        if self._segment.layer_idx is None:
            raise AssertionError(f"{self._segment} is of no block")
        return self._segment.layer_idx

    @property
    def _prefix(self) -> str:
        return f"model.layers.{self._layer_idx}"

    def _weight(self, parts: Mapping[str, tuple[int, int, int]]) -> oracle.Weight:
        """The segment's weights by name; of those in `parts` (axis, first, last) alone."""
        source = self._source
        if source is None:
            raise AssertionError("nothing is loaded")

        def find(name: str) -> HeldRows:
            box = self._boxes.get(name, Box.whole(self._shapes[name]))
            if name in parts:
                axis, first, last = parts[name]
                starts, stops = list(box.starts), list(box.stops)
                starts[axis], stops[axis] = starts[axis] + first, starts[axis] + last
                box = Box(tuple(starts), tuple(stops))
            return HeldRows(source, name, box)

        return find

    def _in_parts(self, extent: int, some: Callable[[int, int], Array]) -> list[Array]:
        cuts = list(slices(extent, -(-extent // self._threads)))
        return list(self._pool.map(lambda cut: some(*cut), cuts))

    def _normed(self, hidden: Array, name: str) -> Array:
        name = f"{self._prefix}.{name}.weight"
        return oracle.rms_norm(hidden, self._weight({}), name, self._model.layernorm_epsilon)

    def _linear(self, normed: Array, name: str) -> Array:
        rows, columns = self._boxes[name].shape

        def some(first: int, last: int) -> Array:
            weight = self._weight({name: (0, first, last)})
            return oracle.linear(normed, weight, name, (last - first, columns))

        return np.concatenate(self._in_parts(rows, some), axis=-1)

    def _replaced(self, states: Sequence[Array], norm: str, name: str) -> list[Array]:
        tokens = _tokens(states)
        change = self._linear(self._normed(tokens, norm), f"{self._prefix}.{name}.weight")
        return _apart(tokens + change, states)


def _sum(parts: Sequence[Array]) -> Array:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _tokens(states: Sequence[Array]) -> Array:
    """All tokens of all states, (1, tokens, hidden_size): one pass over the weights for them."""
    return np.concatenate([state.reshape(1, -1, state.shape[-1]) for state in states], axis=1)


def _apart(tokens: Array, states: Sequence[Array]) -> list[Array]:
    """Inverse of `_tokens`, whatever the last dimension has become."""
    ends = np.cumsum([state.shape[0] * state.shape[1] for state in states])[:-1]
    pieces = np.split(tokens[0], ends)
    return [
        piece.reshape(*state.shape[:2], -1) for piece, state in zip(pieces, states, strict=True)
    ]
