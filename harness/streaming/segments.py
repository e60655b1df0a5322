"""What is read, used by all three implementations, and dropped before the next: a segment.

Most are a sub-block. A feed-forward that would not fit is cut along its width, as tensor
parallelism cuts it: a SwiGLU is a sum over its width. The output layer is cut along the vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from bridge.errors import UsageError
from bridge.tiling import Box, Shape
from harness.oracle import Architecture, Mlp
from harness.probes import Ids
from harness.toys import hf_tensors

Part = Literal["embedding", "attention", "ffn", "head"]
Blocks = Sequence[int]

_RESERVED: Final = 0.05
"""Share of the budget for activations and for the pieces that are converted at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One step of the walk.

    Args:
        part: Of the model.
        layer_idx: Which block; None for the embedding and the head.
        boxes: What is read, by Hugging Face names; several of one tensor for the embedding.
        start: First unit of the width, or first token of the vocabulary, of this slice.
        stop: Past the last.
        slice_idx: Which slice.
        num_slices: Of how many.
    """

    part: Part
    layer_idx: int | None = None
    boxes: tuple[tuple[str, Box], ...] = ()
    start: int = 0
    stop: int = 0
    slice_idx: int = 0
    num_slices: int = 1

    @property
    def num_parameters(self) -> int:
        """Elements that are read."""
        return sum(box.volume for _, box in self.boxes)

    @property
    def is_first(self) -> bool:
        """Whether no slice of this part came before."""
        return self.slice_idx == 0

    @property
    def is_last(self) -> bool:
        """Whether no slice of this part is to come."""
        return self.slice_idx == self.num_slices - 1

    @property
    def ends_block(self) -> bool:
        """Whether there is a state to judge after it."""
        return self.part == "embedding" or (self.part == "ffn" and self.is_last)

    def __str__(self) -> str:
        """As in a sentence: `the FFN sub-block, units 0-511 (slice 1 of 3)`."""
        if self.part == "embedding":
            return "the embedding"
        name = {"attention": "the attention sub-block", "ffn": "the FFN sub-block"}.get(
            self.part, "the head"
        )
        if self.num_slices == 1:
            return name
        unit = "tokens" if self.part == "head" else "units"
        return (
            f"{name}, {unit} {self.start}-{self.stop - 1} "
            f"(slice {self.slice_idx + 1} of {self.num_slices})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How bytes are shared out.

    Args:
        words: For what is read: the present segment and the next.
        module: For the one module that is filled with a segment.
    """

    words: int
    module: int


def segments_of(
    model: Architecture,
    tokens: Sequence[int],
    *,
    memory_budget: int,
    word: int,
    element: int,
    blocks: Blocks | None = None,
    head: bool = True,
) -> tuple[list[Segment], Budget]:
    """Cut a model into segments of which a few fit into a budget at once.

    Args:
        model: The architecture, as the oracle reads it.
        tokens: Token ids whose rows of the embedding are wanted.
        memory_budget: Bytes for weights, read or being computed with.
        word: Bytes of a stored element.
        element: Bytes of an element that is computed with; in the other models too.
        blocks: Only these, in order, as a model of their own; None for all of them.
        head: Whether the final norm and the output layer are wanted too.

    Returns:
        The segments in the order of the model, and how the budget is shared.

    Raises:
        UsageError: BR001, the largest piece that cannot be cut does not fit.
    """
    chosen = range(len(model.blocks)) if blocks is None else blocks
    usable = int(memory_budget * (1 - _RESERVED))
    shapes = hf_tensors(model)
    fixed = [
        _whole(shapes, part, layer_idx)
        for layer_idx in chosen
        for part in ("attention", "ffn")
        if part == "attention" or not isinstance(model.blocks[layer_idx][1], Mlp)
    ]
    first = embedding_segment(model, tokens)
    largest = max(one.num_parameters for one in (first, *fixed))
    unit = 3 * model.hidden_size  # one column of the width, or a token and more
    least = largest * (word + element), (unit * (2 * word + element))
    if usable < max(least):
        raise UsageError(
            f"a memory budget of {_mib(memory_budget)} is too small: what cannot be cut takes "
            f"{_mib(max(least))}",
            hint=f"give --memory-budget {_mib(max(least) / (1 - _RESERVED))} or more",
        )
    most = min((usable - largest * element) // (2 * word), usable // (2 * word + element))
    most = max(most, unit)
    found = [first]
    for layer_idx in chosen:
        found += _block(model, shapes, layer_idx, most)
    if head:
        found += _head(model, most)
    module = max(one.num_parameters for one in found) * element
    return found, Budget(words=usable - module, module=module)


def _mib(nbytes: float) -> str:
    if nbytes < 1 << 10:
        return f"{math.ceil(nbytes)}B"
    unit, name = (1 << 20, "MiB") if nbytes > 8 << 20 else (1 << 10, "KiB")
    return f"{math.ceil(nbytes / unit)}{name}"


def embedding_segment(model: Architecture, tokens: Sequence[int]) -> Segment:
    """The rows of the embedding that tokens name, in the order of their ids."""
    name, rest = "model.embed_tokens.weight", (model.hidden_size,)
    boxes = tuple((name, Box.rows(token, token + 1, rest)) for token in sorted(set(tokens)))
    return Segment(part="embedding", boxes=boxes, stop=model.vocab_size)


def slices(extent: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut an extent into the fewest parts of at most `most`, as even as whole numbers are."""
    count = -(-extent // max(1, most))
    edges = [extent * number // count for number in range(count + 1)]
    yield from itertools.pairwise(edges)


def distinct_blocks(model: Architecture) -> list[int]:
    """One block of each kind, the first of it."""
    found: dict[object, int] = {}
    for layer_idx, block in enumerate(model.blocks):
        found.setdefault(block, layer_idx)
    return sorted(found.values())


def blocks_named(text: str, model: Architecture) -> list[int]:
    """The blocks that `distinct`, or `0,5-9`, names, in order.

    Raises:
        UsageError: BR001, not such a list, or blocks that the model does not have.
    """
    if text == "distinct":
        return distinct_blocks(model)
    found: set[int] = set()
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(
                f"{piece.strip()!r} names no block", hint="write distinct, or such as 0,5-9"
            )
        end = int(last if dash else first)
        if end >= len(model.blocks) or end < int(first):
            raise UsageError(
                f"the model has no blocks {piece.strip()}",
                hint=f"its blocks are 0-{len(model.blocks) - 1}",
            )
        found |= set(range(int(first), end + 1))
    return sorted(found)


def distinct_tokens(input_ids: Sequence[Ids]) -> list[int]:
    """The token ids of all inputs, each once."""
    ids: list[int] = np.unique(np.concatenate([one.ravel() for one in input_ids])).tolist()
    return ids


def _whole(shapes: dict[str, Shape], part: Part, layer_idx: int) -> Segment:
    """A sub-block with all that it reads, its norm included."""
    prefix = f"model.layers.{layer_idx}."
    own = (
        ("input_layernorm.", "self_attn.")
        if part == "attention"
        else ("post_attention_layernorm.", "mlp.")
    )
    boxes = tuple(
        (name, Box.whole(shape))
        for name, shape in shapes.items()
        if name.startswith(tuple(prefix + one for one in own))
    )
    return Segment(part=part, layer_idx=layer_idx, boxes=boxes)


def _block(
    model: Architecture, shapes: dict[str, Shape], layer_idx: int, most: int
) -> Iterator[Segment]:
    # What is absent is walked through too: the models may see something there.
    yield _whole(shapes, "attention", layer_idx)
    ffn = model.blocks[layer_idx][1]
    if not isinstance(ffn, Mlp):
        yield _whole(shapes, "ffn", layer_idx)
        return
    hidden, width = model.hidden_size, ffn.ffn_hidden_size
    cuts = list(slices(width, (most - hidden) // (3 * hidden)))
    prefix = f"model.layers.{layer_idx}"
    for number, (start, stop) in enumerate(cuts):
        rows = Box.rows(start, stop, (hidden,))
        yield Segment(
            part="ffn",
            layer_idx=layer_idx,
            boxes=(
                (f"{prefix}.post_attention_layernorm.weight", Box.whole((hidden,))),
                (f"{prefix}.mlp.gate_proj.weight", rows),
                (f"{prefix}.mlp.up_proj.weight", rows),
                (f"{prefix}.mlp.down_proj.weight", Box((0, start), (hidden, stop))),
            ),
            start=start,
            stop=stop,
            slice_idx=number,
            num_slices=len(cuts),
        )


def _head(model: Architecture, most: int) -> Iterator[Segment]:
    hidden = model.hidden_size
    name = "model.embed_tokens.weight" if model.tied else "lm_head.weight"
    cuts = list(slices(model.vocab_size, (most - hidden) // hidden))
    for number, (start, stop) in enumerate(cuts):
        yield Segment(
            part="head",
            boxes=(
                ("model.norm.weight", Box.whole((hidden,))),
                (name, Box.rows(start, stop, (hidden,))),
            ),
            start=start,
            stop=stop,
            slice_idx=number,
            num_slices=len(cuts),
        )
