"""A run as one HTML page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bridge.drawing.architecture import Architecture
from bridge.drawing.figure import figure
from bridge.drawing.svg import svg
from harness.report.charts import Series, bars, lines
from harness.report.evidence import number
from harness.report.summary import (
    badness,
    by_layout,
    counted,
    failures,
    gib,
    grid,
    limit_unit,
    matrix_rows,
    short,
    worst_by_model,
)

_TEMPLATES: Final = Path(__file__).with_name("templates")
_SLOWEST: Final = 12
_BANDS: Final = {
    "k-full": "attention and MLP",
    "k-linear": "a part is linear",
    "k-noop": "a part is a no-op",
    "k-edge": "embedding, output layer",
}
_STEPS: Final = 5
"""Shades of the heat map, each half a decade or so of the excess."""


def html(data: Mapping[str, Any], *, kill_matrix: Mapping[str, Any] | None = None) -> str:
    """Evidence as a page; with the kill matrix, if there is one.

    Args:
        data: Evidence, valid by the schema.
        kill_matrix: What `nemotron-bridge faults --json` prints.
    """
    return _environment().get_template("report.html.j2").render(
        data=data,
        pictures=_pictures(data["inputs"]),
        checks=grid(data["cases"], columns="check"),
        heat=by_layout(data),
        broken=failures(data),
        logits=[_logits(case) for case in worst_by_model(data, "logits", "by_position")],
        blocks=[_blocks(case) for case in worst_by_model(data, "blocks", "blocks")],
        matrix=None if kill_matrix is None else _matrix(kill_matrix),
        slowest=_slowest(data["cases"]),
        by_time=_by_time(data["cases"]),
        memory=_memory(data["memory"]),
        cases=sorted(data["cases"], key=badness, reverse=True),
    )  # fmt: skip


def render_kill_matrix(data: Mapping[str, Any]) -> str:
    """The kill matrix as a page of its own.

    Args:
        data: `faults`, `checks`, `killed_by`, `survivors`, and what else `nemotron-bridge faults
            --json` prints: `families`, `stands_for`, `idle_checks`, `toys`, `seconds`.
    """
    template = _environment().get_template("matrix.html.j2")
    return template.render(matrix=_matrix(data))


@functools.cache
def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "gib": gib,
        "short": short,
        "limit_unit": limit_unit,
        "counted": counted,
        "number": number,
        "heat": _heat,
        "band": _BANDS.__getitem__,
    }
    found.globals["style"] = Markup((_TEMPLATES / "report.css").read_text("utf-8"))  # noqa: S704 - ours
    return found


def _heat(value: float | None, limit: float | None) -> str:
    """The shade of an excess: 1 as good as the reference, 4 at the limit, 5 and above it."""
    if value is None:
        return "none"
    if math.isnan(value) or not limit:
        return "bad"
    if value > limit:
        return "bad"
    return f"h{min(_STEPS, max(1, math.ceil(_STEPS * value / limit)))}"


def _pictures(inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, Markup]:
    """The blocks of each model, once whatever its dtypes."""
    found = {
        name.partition("/")[0]: one["architecture"]
        for name, one in inputs.items()
        if "architecture" in one
    }
    return {
        name: Markup(svg(figure(Architecture.from_data(one, name=name)), inline=True))  # noqa: S704 - escaped
        for name, one in found.items()
    }


def _numbers(values: Iterable[object]) -> list[float | None]:
    return [number(value) for value in values]


def _logits(case: Mapping[str, Any]) -> dict[str, Any]:
    details = case["details"]
    at = details["by_position"]
    labels = [str(position) for position in at["positions"]]
    by = {name: _numbers(at[name]) for name in at if name != "positions"}
    ulp = [(label, int(count)) for label, count in _edges(details.get("ulp_histogram", {}).items())]
    return {
        "case": case,
        "figures": [
            (
                "Distance from the oracle",
                lines(
                    [
                        Series(name="Megatron", style="s1", values=by["candidate_error"]),
                        Series(name="reference", style="s2", values=by["reference_error"]),
                    ],
                    labels, x="position", y="rms error, logits",
                ),
            ),
            (
                "Megatron against the reference",
                lines(
                    [
                        Series(name="max |diff|, logits", style="s1", values=by["max_abs_diff"]),
                        Series(name="KL, nats per token", style="s3", values=by["kl"]),
                    ],
                    labels, x="position", y="logits; nats per token",
                ),
            ),
            (
                "Same first choice, and share of the first five in common",
                lines(
                    [
                        Series(name="top-1", style="s1", values=by["top1"]),
                        Series(name="top-5", style="s3", values=by["top5"]),
                    ],
                    labels, x="position", y="agreement", log=False,
                ),
            ),
            (
                "Differences in ulp of the dtype",
                bars(ulp, x="ulp, at most", y="logits"),
            ),
        ],
    }  # fmt: skip


def _edges(buckets: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return [("more" if edge == "inf" else edge, count) for edge, count in buckets]


def _blocks(case: Mapping[str, Any]) -> dict[str, Any]:
    rows: Sequence[Mapping[str, Any]] = case["details"]["blocks"]
    kinds = [str(row.get("kind", "")) for row in rows]
    return {
        "case": case,
        "bands": [name for name in _BANDS if name in {_band(kind) for kind in kinds}],
        "figure": lines(
            [
                Series(
                    name="teacher-forced", style="s1",
                    values=[number(row.get("teacher_excess")) for row in rows],
                ),
                Series(
                    name="free-running", style="s3",
                    values=[number(row.get("free_excess")) for row in rows],
                ),
            ],
            [_block_label(row) for row in rows],
            x="layer_idx", y="excess error (reference = 1)",
            limit=number(case.get("limit")),
            bands=[(_band(kind), kind) for kind in kinds],
        ),
    }  # fmt: skip


def _block_label(row: Mapping[str, Any]) -> str:
    """The embedding is judged as the block before the first, the output layer after the last."""
    kind, layer_idx = str(row.get("kind", "")), row.get("layer_idx", "")
    return "emb" if layer_idx == -1 else "out" if kind.startswith("final norm") else str(layer_idx)


def _band(kind: str) -> str:
    """The colour of a block: what it has in place of attention or MLP is what sets it apart."""
    if kind == "embedding" or kind.startswith("final norm"):
        return "k-edge"
    if "no-op" in kind:
        return "k-noop"
    return "k-linear" if "linear" in kind else "k-full"


def _by_time(cases: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, str]]:
    """Check, seconds of all its cases, and both in words; the longest first."""
    found = []
    for name in dict.fromkeys(case["check"] for case in cases):
        mine = [case["seconds"] for case in cases if case["check"] == name]
        found.append((name, float(sum(mine)), f"{sum(mine):.1f} s, {len(mine)} cases"))
    return sorted(found, key=lambda one: one[1], reverse=True)


def _slowest(cases: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, str]]:
    ordered = sorted(cases, key=lambda case: case["seconds"], reverse=True)
    return [
        (case["id"], case["seconds"], f"{case['seconds']:.2f} s") for case in ordered[:_SLOWEST]
    ]


def _memory(found: Mapping[str, int]) -> list[tuple[str, int, str]]:
    names = {"main_bytes": "the run itself", "largest_rank_bytes": "largest process it started"}
    return [(names[key], nbytes, gib(nbytes)) for key, nbytes in found.items() if nbytes]


def _matrix(data: Mapping[str, Any]) -> dict[str, Any]:
    families = data.get("families", {})
    rows: dict[str, list[tuple[str, list[bool]]]] = {}
    for fault, killed in matrix_rows(data):
        rows.setdefault(str(families.get(fault, "")), []).append((fault, killed))
    kills = [sum(check in data["killed_by"].get(fault, ()) for fault in data["faults"])
             for check in data["checks"]]  # fmt: skip
    return {
        "checks": list(data["checks"]),
        "kills": kills,
        "rows": rows,
        "faults": len(data["faults"]),
        "survivors": list(data["survivors"]),
        "idle": [name for name, count in zip(data["checks"], kills, strict=True) if not count],
        "stands_for": data.get("stands_for", {}),
        "toys": data.get("toys", []),
        "seconds": data.get("seconds"),
    }
