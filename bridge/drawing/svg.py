"""A figure as SVG, light or dark as its reader is, alone in a file or within a page.

Colours are attributes, which every reader of SVG knows; the style sheet only darkens them.
"""

from __future__ import annotations

import re
from xml.sax.saxutils import escape, quoteattr

from bridge.drawing.figure import WIDTH, Band, Box, Figure, Shape, Words
from bridge.drawing.palette import DARK, LIGHT

_CLASS = "architecture"
"""Of the figure: a page's own rules for figures leave it alone, and its own leave the page."""
_ILLEGAL = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 has no place for, not even escaped."""
_STYLE = (
    "@media (prefers-color-scheme: dark) { "
    + " ".join(f".{_CLASS} .of-{name} {{ fill: {colour}; }}" for name, colour in DARK.items())
    + " }"
)


def svg(figure: Figure, *, inline: bool = False) -> str:
    """The text of an SVG document, or of an element of an HTML page, which needs no namespace."""
    namespace = "" if inline else 'xmlns="http://www.w3.org/2000/svg" '
    shapes = "\n".join(_shape(shape) for shape in figure.shapes)
    return (
        f'<svg {namespace}class="{_CLASS}" '
        f'viewBox="0 0 {WIDTH} {figure.height:g}" role="img" '
        f"aria-label={quoteattr(_legal(figure.title))} "
        'font-family="system-ui, -apple-system, Segoe UI, DejaVu Sans, sans-serif">\n'
        f"<style>{_STYLE}</style>\n{shapes}\n</svg>\n"
    )


def _legal(text: str) -> str:
    return _ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", text)


def _shape(shape: Shape) -> str:
    fill = f'class="of-{shape.style}" fill="{LIGHT[shape.style]}"'
    match shape:
        case Box(title=title):
            place = f'x="{shape.x:.4g}" y="{shape.y:.4g}" width="{shape.width:.4g}"'
            start = f'<rect {fill} {place} height="{shape.height:.4g}"'
            return (
                f"{start}><title>{escape(_legal(title))}</title></rect>" if title else f"{start}/>"
            )
        case Band(top=(left, right, top), bottom=(low_left, low_right, bottom)):
            corners = ((left, top), (right, top), (low_right, bottom), (low_left, bottom))
            points = " ".join(f"{x:.4g},{y:.4g}" for x, y in corners)
            return f'<polygon {fill} points="{points}"/>'
        case Words():
            weight = ' font-weight="600"' if shape.bold else ""
            return (
                f'<text {fill} x="{shape.x:.4g}" y="{shape.y:.4g}" font-size="{shape.size:g}" '
                f'text-anchor="{shape.anchor}"{weight}>{escape(_legal(shape.text))}</text>'
            )
