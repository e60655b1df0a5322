"""The picture is right, holds together, and says what it shows; SVG and PNG alike."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bridge.convert import read_spec
from bridge.drawing.architecture import Architecture, architecture
from bridge.drawing.figure import WIDTH, Band, Box, Figure, Words, billions, figure
from bridge.drawing.palette import DARK, LIGHT
from bridge.drawing.svg import svg
from bridge.hf_config import spec_from_hf_config
from bridge.parameters import block_num_parameters, embedding_num_parameters, output_num_parameters
from bridge.pipeline import parse_layout
from bridge.spec import GroupedQueryAttention, Linear, ModelSpec, NoOp, SwiGLU
from harness.toys import TOYS

VARIANTS = Path(__file__).parents[3] / "suites" / "variants"
PATHS = {path.stem: path for path in sorted(VARIANTS.glob("*.json"))}
LAYOUTS = ("tp1-pp1", "tp1-pp2", "tp2-pp2-vp2")
SVG = "{http://www.w3.org/2000/svg}"


@functools.cache
def spec_of(name: str) -> ModelSpec:
    """A published configuration or a toy's."""
    return read_spec(PATHS[name]) if name in PATHS else spec_from_hf_config(TOYS[name].config)


def drawn(name: str, layout: str | None = None) -> Architecture:
    """A model, cut or whole."""
    spec = spec_of(name)
    return architecture(spec, None if layout is None else parse_layout(layout, spec), name=name)


def boxes(found: Figure, style: str) -> list[Box]:
    """Those of one style that stand for something: the legend's have no title."""
    return [
        one for one in found.shapes if isinstance(one, Box) and one.style == style and one.title
    ]


@pytest.mark.parametrize("name", [*PATHS, *TOYS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_shape_is_on_the_paper_and_no_words_meet(name: str, layout: str) -> None:
    """Widths of words as of the widest common font; those of one line do not overlap."""
    found = figure(drawn(name, layout))
    lines: dict[float, list[tuple[float, float]]] = {}
    for one in found.shapes:
        match one:
            case Box():
                assert 0 <= one.x <= one.x + one.width <= WIDTH
                assert 0 <= one.y <= one.y + one.height <= found.height
            case Band():
                assert all(0 <= x <= WIDTH for x in (*one.top[:2], *one.bottom[:2]))
            case Words():
                width = 0.6 * one.size * len(one.text)
                left = one.x - {"start": 0, "middle": width / 2, "end": width}[one.anchor]
                assert left >= 0
                assert left + width <= WIDTH
                assert one.y <= found.height - 3
                lines.setdefault(round(one.y), []).append((left, left + width))
    for line in lines.values():
        assert all(first[1] <= second[0] for first, second in pairwise(sorted(line)))


@pytest.mark.parametrize("name", [*PATHS, *TOYS])
def test_bars_are_the_blocks(name: str) -> None:
    """One of each kind per block, from left to right, heights in the ratio of what they show."""
    spec = spec_of(name)
    found = figure(drawn(name))
    for style, kind, size in (
        ("attention", GroupedQueryAttention, "num_query_groups"),
        ("ffn", SwiGLU, "ffn_hidden_size"),
    ):
        halves = [getattr(block, style) for block in spec.blocks]
        sizes = [getattr(half, size) for half in halves if isinstance(half, kind)]
        bars = boxes(found, style)
        assert len(bars) == len(sizes)
        assert [bar.x for bar in bars] == sorted(bar.x for bar in bars)
        shown = [bar.height / max(bar.height for bar in bars) for bar in bars]
        power = 0.5 if min(sizes) < max(sizes) / 20 else 1.0
        expected = [(size / max(sizes)) ** power for size in sizes]
        assert shown == pytest.approx(expected, rel=1e-6)
        square_root = any(
            "square-root" in one.text for one in found.shapes if isinstance(one, Words)
        )
        assert (style != "ffn") or (square_root == (power == 0.5))
    every = [half for one in spec.blocks for half in (one.attention, one.ffn)]
    for style, stub in (("linear", Linear()), ("no_op", NoOp())):
        assert len(boxes(found, style)) == every.count(stub)


def test_what_a_viewer_is_told_of_a_block_and_of_the_ends() -> None:
    """Layer, kinds, and exact parameters; the middle of a bar is over its layer's number."""
    spec, found = (
        spec_of("Llama-3_1-Nemotron-Ultra-253B-v1"),
        figure(drawn("Llama-3_1-Nemotron-Ultra-253B-v1")),
    )
    titles = [bar.title for bar in boxes(found, "ffn")]
    assert (
        "layer 134: attention none; feed-forward width 425,984; 20,937,981,952 parameters" in titles
    )
    bar = next(bar for bar in boxes(found, "ffn") if bar.title.startswith("layer 125:"))
    number = next(one for one in found.shapes if isinstance(one, Words) and one.text == "125")
    assert bar.x + bar.width / 2 == pytest.approx(number.x)
    ends = [box.title for box in boxes(found, "edge")]
    assert ends == [
        f"embedding: {embedding_num_parameters(spec):,} parameters",
        f"final norm and output layer: {output_num_parameters(spec):,} parameters",
    ]


def test_stages_are_drawn_over_their_layers_in_the_ratio_of_their_parameters() -> None:
    """Bars, sizes, and a band from the layers to the bar, of every other stage."""
    name, layout = "Llama-3_1-Nemotron-Ultra-253B-v1", "tp8-pp8"
    spec = spec_of(name)
    found = figure(drawn(name, layout))
    bars = boxes(found, "stage")
    sizes = []
    for stage in parse_layout(layout, spec).stages():
        size = sum(block_num_parameters(spec, layer_idx) for layer_idx in stage.layers)
        size += embedding_num_parameters(spec) if stage.pre_process else 0
        sizes.append(size + (output_num_parameters(spec) if stage.post_process else 0))
    heights = [bar.height for bar in bars]
    assert heights == pytest.approx([max(heights) * size / max(sizes) for size in sizes])
    words = [one.text for one in found.shapes if isinstance(one, Words)]
    assert [f"{size / 1e9:.1f} B" for size in sizes] == [
        one for one in words if one.endswith(" B") and len(one) < 8
    ]
    bands = [one for one in found.shapes if isinstance(one, Band)]
    step = (bands[0].top[1] - bands[0].top[0]) / 27  # layers 0-26
    for band, stage in zip(bands, list(parse_layout(layout, spec).stages())[::2], strict=True):
        assert band.top[0] - bands[0].top[0] == pytest.approx(step * stage.layers.start)
        assert band.top[1] - band.top[0] == pytest.approx(step * len(stage.layers))
    assert "layout tp8-pp8" in words[-1]
    assert "shared by 8 TP ranks" in words[-1]


def test_data_of_a_report_draws_the_same_picture() -> None:
    """Through JSON and back, for a model that is not cut."""
    for name in TOYS:
        whole = drawn(name)
        data = json.loads(json.dumps(whole.as_data()))
        assert Architecture.from_data(data, name=name) == whole


def test_svg_is_a_document_that_says_in_words_what_it_shows() -> None:
    """Well-formed, labelled, whatever the model's name; each block has its tooltip."""
    hostile = "<script>\"&'</script>"
    found = figure(dataclasses.replace(drawn("puzzle", "tp1-pp2"), name=hostile))
    text = svg(found)
    root = ET.fromstring(text)  # noqa: S314 - our own
    assert root.attrib["aria-label"] == f"{hostile}: 7 blocks"
    assert root.attrib["viewBox"] == f"0 0 960 {found.height:g}"
    assert hostile in [one.text for one in root.iter(f"{SVG}text")]
    titles = [one.text or "" for one in root.iter(f"{SVG}title")]
    assert sum(title.startswith("layer 3:") for title in titles) == 2
    assert len(list(root.iter(f"{SVG}rect"))) == sum(isinstance(one, Box) for one in found.shapes)


def test_a_name_of_any_characters_makes_a_document() -> None:
    """XML has no place for most control characters, nor for halves of a pair."""
    named = Figure(title="a\x00<\ud800\x1b", height=9.0, shapes=())
    document = ET.fromstring(svg(named))  # noqa: S314 - our own
    assert document.get("aria-label") == "a\ufffd<\ufffd\ufffd"


def test_colours_are_there_for_light_and_dark_and_reach_nothing_else() -> None:
    """Each style has both; the sheet darkens the figure alone, and attributes need no sheet."""
    text = svg(figure(drawn("puzzle", "tp1-pp2")))
    root = ET.fromstring(text)  # noqa: S314 - our own
    style = next(root.iter(f"{SVG}style")).text or ""
    assert set(LIGHT) == set(DARK)
    assert all(f".architecture .of-{name} {{ fill: {DARK[name]}; }}" in style for name in DARK)
    for one in root.iter():
        if one.tag.removeprefix(SVG) in {"rect", "polygon", "text"}:
            name: Any = one.attrib["class"].removeprefix("of-")
            assert one.attrib["fill"] == LIGHT[name]


@pytest.mark.parametrize(
    ("count", "words"),
    [(7, "7"), (1234, "1.23 k"), (45_600, "45.6 k"), (999_999, "1000 k"),
     (20_937_981_952, "20.9 B"), (253_401_268_224, "253 B"), (1_050_673_152, "1.05 B")],
)  # fmt: skip
def test_parameters_are_shown_in_three_digits(count: int, words: str) -> None:
    """Units of thousands, millions, billions."""
    assert billions(count) == words


def test_png_shows_the_bars_where_the_figure_has_them() -> None:
    """Twice its size; colours of paper, bars and stubs at their places; words are inked."""
    image = pytest.importorskip("PIL.Image", reason="needs Pillow, the extra `png`")
    from bridge.drawing.png import png

    found = figure(drawn("puzzle", "tp1-pp2"))
    picture = image.open(io.BytesIO(png(found)))
    assert picture.size == (1920, round(2 * found.height))

    def colour(x: float, y: float) -> str:
        return "#{:02x}{:02x}{:02x}".format(*picture.getpixel((round(2 * x), round(2 * y))))

    for style in ("attention", "ffn", "linear", "no_op", "stage", "edge"):
        for box in boxes(found, style):
            assert colour(box.x + box.width / 2, box.y + box.height / 2) == LIGHT[box.style]
    assert colour(3, 3) == LIGHT["paper"]
    for words in (one for one in found.shapes if isinstance(one, Words)):
        left = words.x - {"start": 0, "middle": 6, "end": 10}[words.anchor]
        area = picture.crop(
            [round(2 * side) for side in (left, words.y - words.size, left + 12, words.y + 1)]
        )
        assert len(area.getcolors(10**6)) > 1, words
