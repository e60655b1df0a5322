"""Where each thing goes in the picture of a model: boxes and words, for any renderer.

From the top: attention upwards, the layers' numbers, feed-forwards downwards, and, for a layout,
the parameters of each stage, joined to the layers it holds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from bridge.drawing.architecture import Architecture, DrawnBlock, SubBlock

Style = Literal[
    "paper", "ink", "soft", "rule", "band", "attention", "ffn", "linear", "no_op", "edge", "stage"
]

WIDTH: Final = 960
_LEFT, _RIGHT = 66, 26
_ATTENTION_TOP, _ATTENTION_HEIGHT = 112, 64
_AXIS_HEIGHT = 26
_FFN_HEIGHT = 150
_JOINT, _FUNNEL, _STAGES_HEIGHT = 25, 22, 84
_ROOMY_SLOT = 50.0
"""Pixels in which a stage's name, size and layers have room."""
_WIDEST_BAR = 40.0
_TICKS = 5
_STUB = 3.0
"""Height of what stands for a no-op; a linear replacement is four times as high."""
_CHAR = 0.56
"""Width of a character in units of its size, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A filled rectangle; `title` is what a viewer shows when it is pointed at."""

    x: float
    y: float
    width: float
    height: float
    style: Style
    title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A filled quadrilateral between two level edges."""

    top: tuple[float, float, float]
    bottom: tuple[float, float, float]
    style: Style


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """One line of text; `y` is its baseline."""

    x: float
    y: float
    text: str
    anchor: Literal["start", "middle", "end"] = "start"
    style: Style = "soft"
    size: float = 11
    bold: bool = False


Shape = Box | Band | Words


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A picture: what it is of, in a sentence, its height, and its shapes from back to front."""

    title: str
    height: float
    shapes: Sequence[Shape] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """Sizes to heights: in proportion, or by the square root where the smallest would vanish."""

    largest: int
    height: float
    root: bool = False

    def __call__(self, size: float) -> float:
        share = size / self.largest
        return self.height * (math.sqrt(share) if self.root else share)

    def ticks(self) -> list[int]:
        """Round sizes, at even distances on the scale."""
        if self.root:
            top = max(_round_numbers((1, 1.6, 2, 2.4, 4, 8), self.largest))
            return [int(top * share) for share in (1 / 16, 1 / 4, 9 / 16, 1)]
        steps = _round_numbers((1, 2, 2.5, 4, 5), self.largest)
        step = int(min(step for step in steps if step >= 1 and self.largest // step <= _TICKS))
        return list(range(step, self.largest + 1, step))


def _round_numbers(firsts: Sequence[float], largest: int) -> list[float]:
    """Numbers of few digits up to `largest`."""
    powers = range(math.floor(math.log10(largest)) + 1)
    return [
        first * 10**power for power in powers for first in firsts if first * 10**power <= largest
    ]


def figure(found: Architecture) -> Figure:
    """Lay a model out."""
    step = (WIDTH - _LEFT - _RIGHT) / len(found.blocks)
    middle = _ATTENTION_TOP + _ATTENTION_HEIGHT
    ffn_top = middle + _AXIS_HEIGHT
    ffn_bottom = ffn_top + _FFN_HEIGHT
    shapes: list[Shape] = [*_head(found)]
    attention = _scale([one.attention for one in found.blocks], _ATTENTION_HEIGHT)
    ffn = _scale([one.ffn for one in found.blocks], _FFN_HEIGHT)
    several = len(found.stages) > 1
    if several:
        shapes += _stages(found, step, ffn_bottom)
    shapes += _grid(attention, middle, up=True)
    shapes += _grid(ffn, ffn_top, up=False)
    for layer_idx, block in enumerate(found.blocks):
        place = _LEFT + layer_idx * step
        title = _block_title(layer_idx, block)
        shapes.append(_bar(block.attention, attention, place, step, middle, title, up=True))
        shapes.append(_bar(block.ffn, ffn, place, step, ffn_top, title, up=False))
    shapes += [*_axis(found, step, middle), *_edges(found, middle)]
    scaled = ", on a square-root scale" if ffn is not None and ffn.root else ""
    shapes.append(
        Words(x=_LEFT, y=_ATTENTION_TOP - 9, text="attention: query groups (key and value heads)")
    )
    shapes.append(
        Words(x=_LEFT, y=ffn_bottom + 17, text=f"feed-forward: hidden width of SwiGLU{scaled}")
    )
    bottom = ffn_bottom + 30.0
    if several:
        bars, bottom = _stage_bars(found, ffn_bottom)
        shapes += bars
    paper = Box(x=0, y=0, width=WIDTH, height=bottom, style="paper")
    title = f"{found.name}: {len(found.blocks)} blocks"
    return Figure(title=title, height=bottom, shapes=(paper, *shapes))


def billions(count: int) -> str:
    """A number of parameters in three digits or so."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            value = count / unit
            return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f} {name}"
    return str(count)


def _head(found: Architecture) -> Iterator[Shape]:
    yield Words(x=_LEFT, y=30, text=found.name, style="ink", size=17, bold=True)
    count = f"{found.num_parameters:,} parameters in {len(found.blocks)} blocks; {found.facts}"
    yield Words(x=_LEFT, y=50, text=count)
    place = float(_LEFT)
    for style, words in _legend(found):
        yield Box(x=place, y=64, width=11, height=11, style=style)
        yield Words(x=place + 16, y=74, text=words)
        place += 16 + 11 * _CHAR * len(words) + 14


def _legend(found: Architecture) -> Iterator[tuple[Style, str]]:
    attention = Counter(one.attention.kind for one in found.blocks)
    ffn = Counter(one.ffn.kind for one in found.blocks)
    if attention["full"]:
        yield "attention", f"attention, {attention['full']} blocks"
    if ffn["full"]:
        yield "ffn", f"feed-forward, {ffn['full']} blocks"
    others: tuple[tuple[Literal["linear", "no_op"], str], ...] = (
        ("linear", "one matrix"),
        ("no_op", "none"),
    )
    for kind, what in others:
        counts = [
            f"{name} {counter[kind]}"
            for name, counter in (("attention", attention), ("feed-forward", ffn))
            if counter[kind]
        ]
        if counts:
            yield kind, f"{what}: {', '.join(counts)}"


def _scale(halves: Sequence[SubBlock], height: float) -> _Scale | None:
    """None where there is nothing of a size."""
    sizes = [one.size for one in halves if one.kind == "full"]
    if not sizes:
        return None
    return _Scale(largest=max(sizes), height=height, root=min(sizes) < max(sizes) / 20)


def _grid(scale: _Scale | None, base: float, *, up: bool) -> Iterator[Shape]:
    if scale is None:
        return
    for size in scale.ticks():
        y = base - scale(size) if up else base + scale(size)
        yield Box(x=_LEFT, y=y - 0.5, width=WIDTH - _LEFT - _RIGHT, height=1, style="rule")
        yield Words(x=_LEFT - 8, y=y + 4, text=f"{size:,}", anchor="end", size=10)


def _bar(
    half: SubBlock, scale: _Scale | None, place: float, step: float, base: float, title: str,
    *, up: bool,
) -> Box:  # fmt: skip
    width = min(step * 0.82 if step > 4 else step * 0.9, _WIDEST_BAR)
    style: Style
    if half.kind == "full" and scale is not None:
        height = max(scale(half.size), 1.0)
        style = "attention" if up else "ffn"
    else:
        height = _STUB * 4 if half.kind == "linear" else _STUB
        style = "linear" if half.kind == "linear" else "no_op"
    return Box(
        x=place + (step - width) / 2,
        y=base - height if up else base,
        width=width,
        height=height,
        style=style,
        title=title,
    )


def _block_title(layer_idx: int, block: DrawnBlock) -> str:
    names = {"linear": "one matrix", "no_op": "none"}
    attention = names.get(block.attention.kind, f"{block.attention.size} query groups")
    ffn = names.get(block.ffn.kind, f"width {block.ffn.size:,}")
    return (
        f"layer {layer_idx}: attention {attention}; feed-forward {ffn}; "
        f"{block.num_parameters:,} parameters"
    )


def _edges(found: Architecture, middle: float) -> Iterator[Shape]:
    """The embedding before the first layer, the output layer after the last, and their sizes."""
    right = WIDTH - _RIGHT
    for x, what, count in (
        (_LEFT - 13, "embedding", found.embedding_parameters),
        (right + 5, "final norm and output layer", found.output_parameters),
    ):
        yield Box(
            x=x, y=middle + 2, width=8, height=_AXIS_HEIGHT - 4, style="edge",
            title=f"{what}: {count:,} parameters",
        )  # fmt: skip
    words = (
        f"embedding {billions(found.embedding_parameters)}, "
        f"output layer {billions(found.output_parameters)}"
    )
    y = _ATTENTION_TOP - 9
    yield Box(x=right - 11, y=y - 10, width=11, height=11, style="edge")
    yield Words(x=right - 16, y=y, text=words, anchor="end")


def _axis(found: Architecture, step: float, middle: float) -> Iterator[Shape]:
    yield Words(x=_LEFT - 18, y=middle + 17, text="layer", anchor="end")
    num_layers = len(found.blocks)
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**6) if n * step >= 26)
    for layer_idx in range(0, num_layers, every):
        x = _LEFT + (layer_idx + 0.5) * step
        yield Words(x=x, y=middle + 17, text=str(layer_idx), anchor="middle", style="ink")


def _stages(found: Architecture, step: float, ffn_bottom: float) -> Iterator[Shape]:
    """Every other stage shaded behind its layers, and down to its place among equal places."""
    slot = (WIDTH - _LEFT - _RIGHT) / len(found.stages)
    joint = ffn_bottom + _JOINT
    for number, stage in enumerate(found.stages):
        if number % 2:
            continue
        left = _LEFT + stage.first_layer * step
        right = left + stage.num_layers * step
        place = _LEFT + number * slot
        yield Box(
            x=left, y=_ATTENTION_TOP, width=right - left, height=joint - _ATTENTION_TOP,
            style="band",
        )  # fmt: skip
        yield Band(
            top=(left, right, joint), bottom=(place, place + slot, joint + _FUNNEL), style="band"
        )
        yield Box(x=place, y=joint + _FUNNEL, width=slot, height=_STAGES_HEIGHT, style="band")


def _stage_bars(found: Architecture, ffn_bottom: float) -> tuple[list[Shape], float]:
    """The parameters of each stage, what they come to, and where that ends."""
    shapes: list[Shape] = []
    stages = found.stages
    slot = (WIDTH - _LEFT - _RIGHT) / len(stages)
    base = ffn_bottom + _JOINT + _FUNNEL + _STAGES_HEIGHT
    sizes = [stage.num_parameters for stage in stages]
    mean = sum(sizes) / len(sizes)
    parts = len({stage.vp_stage for stage in stages}) > 1
    roomy = slot >= _ROOMY_SLOT
    every = 1 if roomy else math.ceil(22 / slot)
    for number, stage in enumerate(stages):
        middle = _LEFT + (number + 0.5) * slot
        height = (_STAGES_HEIGHT - 22) * stage.num_parameters / max(sizes)
        width = min(slot * 0.62, _WIDEST_BAR)
        name = f"rank {stage.pp_rank}.{stage.vp_stage}" if parts else f"stage {number}"
        last = stage.first_layer + stage.num_layers - 1
        layers = f"{stage.first_layer}-{last}" if stage.num_layers else "no layer"
        title = f"{name}: layers {layers}; {stage.num_parameters:,} parameters"
        bar = Box(
            x=middle - width / 2, y=base - height, width=width, height=height, style="stage",
            title=title,
        )  # fmt: skip
        shapes.append(bar)
        labels = [(base - height - 5, billions(stage.num_parameters)), (base + 14, name)]
        if roomy:
            shapes.append(Words(x=middle, y=base + 28, text=layers, anchor="middle", size=10))
        else:
            labels = [(base + 14, str(number))] if number % every == 0 else []
        shapes += [
            Words(x=middle, y=y, text=text, anchor="middle", style="ink") for y, text in labels
        ]
    shared = (
        f", each shared by {found.tensor_model_parallel_size} TP ranks"
        if found.tensor_model_parallel_size > 1
        else ""
    )
    caption = (
        f"layout {found.layout}: parameters of each "
        f"{'model part (rank.part)' if parts else 'pipeline stage'}{shared}; "
        f"the largest {billions(max(sizes))}, {max(sizes) / mean - 1:.1%} above the mean"
    )
    end = base + (46 if roomy else 32)
    return [*shapes, Words(x=_LEFT, y=end, text=caption)], end + 14
