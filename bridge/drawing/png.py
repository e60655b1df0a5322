"""A figure as PNG, by Pillow, which brings a font of its own: none of the system's is needed."""

from __future__ import annotations

import io
from importlib.util import find_spec
from typing import Final

from bridge.drawing.figure import WIDTH, Band, Box, Figure, Words
from bridge.drawing.palette import LIGHT
from bridge.errors import EnvironmentMissingError

_SCALE: Final = 2
"""Pixels per unit of the figure."""
_SMOOTH: Final = 2
"""Boxes are drawn this much larger still, and made smaller: edges between pixels are soft."""
_ANCHORS: Final = {"start": "ls", "middle": "ms", "end": "rs"}


def check_pillow() -> None:
    """See that Pillow is there.

    Raises:
        EnvironmentMissingError: BR500, it is not.
    """
    if find_spec("PIL") is None:
        raise EnvironmentMissingError(
            "PNG needs Pillow", hint="pip install 'nemotron-bridge[png]', or draw an .svg"
        )


def png(figure: Figure) -> bytes:
    """The content of a PNG file, on light paper. `check_pillow` must have passed."""
    from PIL import Image, ImageDraw, ImageFont

    size = round(WIDTH * _SCALE), round(figure.height * _SCALE)
    picture = Image.new("RGB", (size[0] * _SMOOTH, size[1] * _SMOOTH), LIGHT["paper"])
    pen = ImageDraw.Draw(picture)
    for shape in figure.shapes:
        match shape:
            case Box():
                right, bottom = shape.x + shape.width, shape.y + shape.height
                corners = [(shape.x, shape.y), (right, bottom)]
                pen.rectangle(_larger(corners, inside=True), fill=LIGHT[shape.style])
            case Band(top=(left, right, top), bottom=(low_left, low_right, bottom)):
                corners = [(left, top), (right, top), (low_right, bottom), (low_left, bottom)]
                pen.polygon(_larger(corners), fill=LIGHT[shape.style])
            case Words():
                pass
    picture = picture.resize(size, Image.Resampling.BOX)
    pen = ImageDraw.Draw(picture)
    for words in figure.shapes:
        if isinstance(words, Words):
            # Bold is twice, a pixel apart: strokes thinner than that need Pillow 11.2.
            for shift in (0, 1) if words.bold else (0,):
                pen.text(
                    (words.x * _SCALE + shift, words.y * _SCALE),
                    words.text,
                    fill=LIGHT[words.style],
                    font=ImageFont.load_default(words.size * _SCALE),
                    anchor=_ANCHORS[words.anchor],
                )
    found = io.BytesIO()
    picture.save(found, "PNG", optimize=True)
    return found.getvalue()


def _larger(
    corners: list[tuple[float, float]], *, inside: bool = False
) -> list[tuple[float, float]]:
    """In pixels of the large picture; Pillow counts a rectangle's last pixel as within it."""
    scale = _SCALE * _SMOOTH
    found = [(round(x * scale), round(y * scale)) for x, y in corners]
    if inside:
        (left, top), (right, bottom) = found
        found[1] = max(left, right - 1), max(top, bottom - 1)
    return [(float(x), float(y)) for x, y in found]
