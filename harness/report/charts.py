"""Figures as inline SVG. Colours are classes of the page's style sheet: light, dark and print.

Text is put in by `Markup.format`, which escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

_WIDTH: Final = 560
_HEIGHT: Final = 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 46
_MAX_TICKS: Final = 9
_CHAR: Final = 6.2
"""Width of a character of a label, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line of a figure.

    Args:
        name: For the legend.
        style: Class of the style sheet: `s1`, `s2`, `s3`.
        values: One per place on the x axis; None, NaN and, on a log axis, what is not positive
            leave a gap.
    """

    name: str
    style: str
    values: Sequence[float | None]


@dataclass(frozen=True, slots=True)
class _Scale:
    """From values to pixels from the top: by decades, or shares from 0 to 1."""

    low: float
    high: float
    log: bool

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        share = (at - self.low) / (self.high - self.low)
        return _TOP + (1 - min(max(share, 0.0), 1.0)) * (_HEIGHT - _TOP - _BOTTOM)

    def ticks(self) -> list[tuple[float, str]]:
        if self.log:
            step = max(1, math.ceil((self.high - self.low) / 5))
            powers = range(math.ceil(self.low), math.floor(self.high) + 1, step)
            return [(10.0**power, _power(power)) for power in powers]
        return [(share, f"{share:g}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]


def _power(exponent: int) -> str:
    return f"{10.0**exponent:g}" if -3 <= exponent <= 3 else f"1e{exponent}"


def lines(
    series: Sequence[Series],
    labels: Sequence[str],
    *,
    x: str,
    y: str,
    log: bool = True,
    limit: float | None = None,
    bands: Sequence[tuple[str, str]] = (),
) -> Markup:
    """Lines over places that are evenly spaced, whatever their labels.

    Args:
        series: What is drawn.
        labels: One per place, for axis and tooltips.
        x: Title of the x axis.
        y: Title of the y axis, with the unit.
        log: Decades; otherwise the values are shares from 0 to 1.
        limit: A dashed line.
        bands: Per place a class (`k-full`) and a tooltip, painted under the axis; or none at all.
    """
    scale = _scale([value for one in series for value in one.values], limit, log=log)
    if scale is None or not labels:
        return _nothing([value for one in series for value in one.values])
    step = (_WIDTH - _LEFT - _RIGHT) / max(len(labels), 1)
    places = [_LEFT + (number + 0.5) * step for number in range(len(labels))]
    parts = [*_frame(scale, x, y), *_x_labels(places, labels, shift=9 if bands else 0)]
    parts += _strip(places, step, bands)
    if limit is not None and math.isfinite(limit):
        parts.append(
            Markup('<line class="limit" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
                _LEFT, _WIDTH - _RIGHT, scale(limit), scale(limit)
            )
        )
        parts.append(
            Markup('<text class="limit-name" x="{}" y="{:.1f}">limit {}</text>').format(
                _WIDTH - _RIGHT, scale(limit) - 4, f"{limit:g}"
            )
        )
    for one in series:
        parts += _line(one, places, labels, scale)
    return _svg(parts, f"{y} by {x}") + _legend(series)


def bars(counts: Sequence[tuple[str, int]], *, x: str, y: str) -> Markup:
    """A histogram; the heights are logarithmic, since one bucket often holds nearly all."""
    top = max((count for _, count in counts), default=0)
    if not top:
        return Markup('<p class="none">Nothing to draw: nothing was counted.</p>')
    scale = _Scale(math.log10(0.5), math.log10(top) + 0.35, log=True)
    step = (_WIDTH - _LEFT - _RIGHT) / len(counts)
    places = [_LEFT + (number + 0.5) * step for number in range(len(counts))]
    parts = [*_frame(scale, x, y), *_x_labels(places, [label for label, _ in counts], shift=0)]
    for place, (label, count) in zip(places, counts, strict=True):
        if not count:
            continue
        height = _HEIGHT - _BOTTOM - scale(count)
        parts.append(
            Markup(
                '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">'
                "<title>{}: {}</title></rect>"
                '<text class="count" x="{:.1f}" y="{:.1f}">{}</text>'
            ).format(
                place - step * 0.38, scale(count), step * 0.76, height, label, count,
                place, scale(count) - 4, count,
            )
        )  # fmt: skip
    return _svg(parts, f"{y} by {x}")


def _nothing(values: Sequence[float | None]) -> Markup:
    """Zero everywhere is the best news there is, and looks like no news on a log axis."""
    why = "zero everywhere" if values and not any(values) and None not in values else "no value"
    return Markup('<p class="none">Nothing to draw: {}.</p>').format(why)


def _scale(values: Iterable[float | None], limit: float | None, *, log: bool) -> _Scale | None:
    drawn = [one for one in values if _drawable(one, log=log)]
    known = [float(one) for one in drawn if one is not None]
    if not known:
        return None
    if limit is not None and _drawable(limit, log=log):
        known.append(limit)
    low, high = min(known), max(known)
    if log:
        low, high = math.log10(low) - 0.15, math.log10(high) + 0.25
        if high - low < 1.2:  # at least one tick of a whole decade, and no noise made into hills
            low, high = math.floor(low), math.ceil(high)
        return _Scale(low, high, log=True)
    return _Scale(0.0, 1.04, log=False)


def _drawable(value: float | None, *, log: bool) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not log)


def _frame(scale: _Scale, x: str, y: str) -> list[Markup]:
    parts = []
    for value, label in scale.ticks():
        parts.append(
            Markup(
                '<line class="rule" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text class="tick y" x="{}" y="{:.1f}">{}</text>'
            ).format(_LEFT, _WIDTH - _RIGHT, scale(value), scale(value), _LEFT - 7,
                     scale(value) + 3.5, label)
        )  # fmt: skip
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        Markup(
            '<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>'
            '<text class="title" x="{}" y="{}">{}</text>'
            '<text class="title" transform="translate(13 {}) rotate(-90)">{}</text>'
        ).format(_LEFT, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, _HEIGHT - _BOTTOM,
                 (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 5, x, middle, y)
    )  # fmt: skip
    return parts


def _x_labels(places: Sequence[float], labels: Sequence[str], *, shift: int) -> list[Markup]:
    widest = max(len(label) for label in labels) * _CHAR + 12
    fitting = max(1, min(_MAX_TICKS + 3, int((_WIDTH - _LEFT - _RIGHT) / widest)))
    every = max(1, math.ceil(len(labels) / fitting))
    return [
        Markup('<text class="tick x" x="{:.1f}" y="{}">{}</text>').format(
            place, _HEIGHT - _BOTTOM + 15 + shift, label
        )
        for number, (place, label) in enumerate(zip(places, labels, strict=True))
        if number % every == 0
    ]


def _strip(places: Sequence[float], step: float, bands: Sequence[tuple[str, str]]) -> list[Markup]:
    if not bands:
        return []
    return [
        Markup(
            '<rect class="band {}" x="{:.1f}" y="{}" width="{:.1f}" height="7">'
            "<title>{}</title></rect>"
        ).format(style, place - step / 2, _HEIGHT - _BOTTOM + 2, step * 0.96, title)
        for place, (style, title) in zip(places, bands, strict=True)
    ]


def _line(
    one: Series, places: Sequence[float], labels: Sequence[str], scale: _Scale
) -> list[Markup]:
    runs: list[list[str]] = [[]]
    dots = []
    for place, label, value in zip(places, labels, one.values, strict=True):
        if value is None or not _drawable(value, log=scale.log):
            runs.append([])
            continue
        runs[-1].append(f"{place:.1f},{scale(value):.1f}")
        dots.append(
            Markup(
                '<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="2.4">'
                "<title>{}, {}: {:.4g}</title></circle>"
            ).format(one.style, place, scale(value), one.name, label, value)
        )
    drawn = [
        Markup('<polyline class="{}" points="{}"/>').format(one.style, " ".join(run))
        for run in runs
        if len(run) > 1
    ]
    return drawn + dots


def _legend(series: Sequence[Series]) -> Markup:
    items = Markup("").join(
        Markup('<span><i class="{}"></i>{}</span>').format(one.style, one.name) for one in series
    )
    return Markup('<div class="legend">{}</div>').format(items)


def _svg(parts: Iterable[Markup], label: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, label, Markup("").join(parts)
    )
