"""Figures as SVG files that need nothing else, light or dark as their reader is.

Those of the HTML report have places evenly apart and are styled by its page. Whether time is linear
in size shows only on a true scale, and a figure in the documentation has no page around it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from markupsafe import Markup

from harness.benchmarks.profile import MIB

_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 46, 46
_STYLE: Final = """
text { fill: #5b6570; } .name { font-weight: 600; } .paper { fill: #f6f8fa; }
.y { text-anchor: end; } .x, .title { text-anchor: middle; }
.rule { stroke: #e3e7eb; } .axis { stroke: #5b6570; }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
polyline.s1 { stroke: #1f5fbf; } polyline.s2 { stroke: #c2410c; } polyline.s3 { stroke: #0f7f77; }
circle.s1 { fill: #1f5fbf; } circle.s2 { fill: #c2410c; } circle.s3 { fill: #0f7f77; }
polyline.limit { stroke: #b3201f; stroke-dasharray: 5 4; }
@media (prefers-color-scheme: dark) {
  text { fill: #97a3b0; } .paper { fill: #1a2027; } .rule { stroke: #2b333c; }
  .axis { stroke: #97a3b0; }
  polyline.s1 { stroke: #7fb0ff; } polyline.s2 { stroke: #ff9f6b; } polyline.s3 { stroke: #5fd3c8; }
  circle.s1 { fill: #7fb0ff; } circle.s2 { fill: #ff9f6b; } circle.s3 { fill: #5fd3c8; }
  polyline.limit { stroke: #ff8f88; }
}
"""
"""Colours of the HTML report, in words that every reader of SVG knows."""

_STYLES: Final = ("s1", "s2", "s3")
_GIB: Final = float(1 << 30)

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Points of one name; those of a `limit` are a dashed line without dots."""

    name: str
    points: Sequence[Point]
    limit: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One figure.

    Args:
        file: Its name.
        title: One line.
        x: Title of the x axis, with the unit.
        y: Title of the y axis, with the unit.
        curves: What is drawn.
        doubling: The x axis has a tick per power of two, in MiB; otherwise it begins at 0.
    """

    file: str
    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    doubling: bool = False

    def svg(self) -> str:
        """The file's text."""
        points = [point for curve in self.curves for point in curve.points]
        across = [self._along(x) for x, _ in points]
        low = min(across) if self.doubling else 0.0
        high = max(*across, low + 1e-9)
        top = max(y for _, y in points) * 1.08 or 1.0

        def place(point: Point) -> Point:
            share = (self._along(point[0]) - low) / (high - low)
            return (
                _LEFT + 8 + share * (_WIDTH - _LEFT - _RIGHT - 16),
                _HEIGHT - _BOTTOM - point[1] / top * (_HEIGHT - _TOP - _BOTTOM),
            )

        parts = []
        for value in steps(top):
            y = place((points[0][0], value))[1]
            parts.append(_tick_y(y, f"{value:g}"))
        for value in sorted({x for x, _ in points}) if self.doubling else steps(high):
            label = _mib(value) if self.doubling else f"{value:g}"
            parts.append(_tick_x(place((value, 0.0))[0], label))
        parts.append(self._frame())
        styles = iter(_STYLES * len(self.curves))
        legend = _LEFT + 8.0
        for curve in self.curves:
            style = "limit" if curve.limit else next(styles)
            parts.append(_curve(curve, style, [place(point) for point in sorted(curve.points)]))
            parts.append(_key(curve.name, style, legend))
            legend += 34 + 6.2 * len(curve.name)
        return str(_document(parts, self.title))

    def _along(self, x: float) -> float:
        return math.log2(x) if self.doubling else x

    def _frame(self) -> Markup:
        middle = (_TOP + _HEIGHT - _BOTTOM) / 2
        return Markup(
            '<text class="name" x="{}" y="18">{}</text>'
            '<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>'
            '<text class="title" x="{}" y="{}">{}</text>'
            '<text class="title" transform="translate(13 {}) rotate(-90)">{}</text>'
        ).format(
            _LEFT + 8, self.title, _LEFT, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, _HEIGHT - _BOTTOM,
            (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, self.x, middle, self.y,
        )  # fmt: skip


def steps(top: float) -> list[float]:
    """Round values from 0 to at most `top`, four to ten of them."""
    unit = 10.0 ** math.floor(math.log10(top))
    step = next(unit * part for part in (0.1, 0.2, 0.25, 0.5, 1.0) if top / (unit * part) < 9)
    return [number * step for number in range(math.floor(top / step + 1e-9) + 1)]


def _mib(nbytes: float) -> str:
    return f"{nbytes / MIB:g} MiB" if nbytes < _GIB else f"{nbytes / _GIB:g} GiB"


def _tick_y(y: float, label: str) -> Markup:
    return Markup(
        '<line class="rule" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
        '<text class="y" x="{}" y="{:.1f}">{}</text>'
    ).format(_LEFT, _WIDTH - _RIGHT, y, y, _LEFT - 7, y + 3.5, label)


def _tick_x(x: float, label: str) -> Markup:
    return Markup('<text class="x" x="{:.1f}" y="{}">{}</text>').format(
        x, _HEIGHT - _BOTTOM + 15, label
    )


def _curve(curve: Curve, style: str, places: Sequence[Point]) -> Markup:
    shown = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    found = Markup('<polyline class="{}" points="{}"/>').format(style, shown)
    if curve.limit:
        return found
    dots = [
        Markup(
            '<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3"><title>{}</title></circle>'
        ).format(style, x, y, f"{curve.name}: {point[1]:.3g}")
        for (x, y), point in zip(places, sorted(curve.points), strict=True)
    ]
    return found + Markup("").join(dots)


def _key(name: str, style: str, x: float) -> Markup:
    return Markup(
        '<polyline class="{}" points="{:.1f},31 {:.1f},31"/><text x="{:.1f}" y="35">{}</text>'
    ).format(style, x, x + 18, x + 23, name)


def _document(parts: Iterable[Markup], title: str) -> Markup:
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" '
        'role="img" aria-label="{title}" font-family="system-ui, sans-serif" font-size="11">'
        '<style>{style}</style><rect class="paper" width="{w}" height="{h}" rx="10"/>{parts}</svg>'
    ).format(
        w=_WIDTH, h=_HEIGHT, title=title, style=Markup(_STYLE),  # noqa: S704 - ours
        parts=Markup("").join(parts),
    ) + Markup("\n")  # fmt: skip


def plots(data: Mapping[str, Any]) -> list[Plot]:
    """The figures that results give rise to; those without a point are left out."""
    found = [
        Plot(
            file="time-by-size.svg", title="Wall time by size of the checkpoint", x="size, GB",
            y="wall time, s",
            curves=_curves(data, "sizes", "size_bytes", "median_seconds", x=1e-9),
        ),
        Plot(
            file="rate-by-budget.svg", title="Throughput, verified, by --memory-budget",
            x="memory budget", y="GB/s", doubling=True,
            curves=_curves(data, "budgets", "memory_budget_bytes", "gb_per_second"),
        ),
        Plot(
            file="memory-by-budget.svg", title="Peak memory by --memory-budget", x="memory budget",
            y="peak memory, GiB", doubling=True,
            curves=_with_limit(
                _curves(data, "budgets", "memory_budget_bytes", "peak_rss_bytes", y=1 / _GIB), data
            ),
        ),
        Plot(
            file="memory-by-size.svg", title="Peak memory by size of the checkpoint", x="size, GB",
            y="peak memory, GiB",
            curves=_curves(data, "sizes", "size_bytes", "peak_rss_bytes", x=1e-9, y=1 / _GIB),
        ),
    ]  # fmt: skip
    return [plot for plot in found if plot.curves]


def _curves(
    data: Mapping[str, Any], group: str, along: str, value: str, *, x: float = 1.0, y: float = 1.0
) -> list[Curve]:
    points: dict[str, list[Point]] = {}
    for one in data["measurements"]:
        found = one["values"].get(value, one.get(value))
        if one["group"] == group and one["status"] == "measured" and found is not None:
            points.setdefault(one["name"], []).append((one["conditions"][along] * x, found * y))
    return [Curve(name=name, points=sorted(places)) for name, places in points.items()]


def _with_limit(curves: list[Curve], data: Mapping[str, Any]) -> list[Curve]:
    points = {
        (one["conditions"]["memory_budget_bytes"], limit["limit"] / _GIB)
        for one in data["measurements"]
        if one["group"] == "budgets"
        for limit in one["limits"]
        if limit["name"] == "peak_rss_bytes"
    }
    return [*curves, Curve(name="limit", points=sorted(points), limit=True)] if points else curves
