"""Deliberate mistakes for generation, resharding and RoPE, importable by rank processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from harness.hooks import Fault
from harness.ranks import RankContext


def crossed_cache(model: Any) -> None:  # noqa: ANN401 - transformers is not typed
    """After the prompt, the first two attentions find each other's keys in the cache."""
    state = {"crossed": False}

    def cross(_module: Any, _args: Any, kwargs: Any) -> None:  # noqa: ANN401 - a hook
        if kwargs["input_ids"].shape[1] > 1:
            state["crossed"] = False
        elif not state["crossed"]:
            cache = kwargs["past_key_values"]
            if hasattr(cache, "layers"):
                first, second = cache.layers[:2]
                first.keys, second.keys = second.keys, first.keys
            else:  # transformers before 4.54
                keys = cache.key_cache
                keys[0], keys[1] = keys[1], keys[0]
            state["crossed"] = True

    model.model.register_forward_pre_hook(cross, with_kwargs=True)


@contextlib.contextmanager
def half_an_output_layer(context: RankContext) -> Iterator[None]:
    """Rank 1 computes with other weights than it was given."""
    import torch

    from bridge import live_parameters

    healthy = live_parameters.load_hf

    def load(parts: Any, *args: Any) -> None:  # noqa: ANN401 - the function's own
        healthy(parts, *args)
        if context.rank == 1:
            with torch.no_grad():
                parts[0].output_layer.weight.mul_(0.5)

    with mock.patch.object(live_parameters, "load_hf", load):
        yield


@contextlib.contextmanager
def rotated_backwards() -> Iterator[None]:
    """Attention turns by the negative angle; the tables are right."""
    from megatron.core.transformer import attention

    healthy = attention.apply_rotary_pos_emb

    def backwards(states: Any, freqs: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as above
        return healthy(states, -freqs, *args, **kwargs)

    with mock.patch.object(attention, "apply_rotary_pos_emb", backwards):
        yield


@contextlib.contextmanager
def last_angle_off() -> Iterator[None]:
    """At the last position of the context, where the model counts, one angle is an ulp off."""
    import torch

    from bridge.rotary import PositionedRotaryEmbedding

    healthy = PositionedRotaryEmbedding._angles

    def angles(self: Any, max_seq_len: int, offset: int) -> Any:  # noqa: ANN401 - torch tensors
        found = healthy(self, max_seq_len, offset)
        if self.position_ids is None and offset + max_seq_len == 131_072:
            found[-1, 0] = torch.nextafter(found[-1, 0], torch.tensor(torch.inf))
        return found

    with mock.patch.object(PositionedRotaryEmbedding, "_angles", angles):
        yield


@contextlib.contextmanager
def padding_left_alone() -> Iterator[None]:
    """Rows that stand for no token are not zeroed."""
    from bridge import loading

    with mock.patch.object(loading, "_zero"):
        yield


def flip_one_bit_of_a_cut(checkpoint: Path) -> None:
    """One bit of a weight, in the files cut for tp1-pp2 only."""
    if "tp1-pp2" in checkpoint.name:
        path = max(checkpoint.glob("iter_*/*.distcp"), key=lambda one: one.stat().st_size)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


def flip_one_bit_of_an_export(directory: Path) -> None:
    """The lowest bit of the last byte of the last weight."""
    path = max(directory.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


CACHE = Fault(name="cache", reference=crossed_cache)
OUTPUT = Fault(name="output", rank=half_an_output_layer)
BACKWARDS = Fault(name="backwards", code=rotated_backwards)
LAST_ANGLE = Fault(name="last-angle", code=last_angle_off)
PADDING = Fault(name="padding", code=padding_left_alone)
CUT = Fault(name="cut", checkpoint=flip_one_bit_of_a_cut)
EXPORT = Fault(name="export", exported=flip_one_bit_of_an_export)
