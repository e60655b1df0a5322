"""A run as Markdown, for a pull request or a release note."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from bridge.visible import visible
from harness.report.summary import (
    by_check,
    by_layout,
    failures,
    gib,
    limit_unit,
    matrix_rows,
    short,
)

_SPECIAL: Final = re.compile(r"([\\`*_\[\]<>|#~])")
_WORD: Final = {"passed": "PASSED", "failed": "FAILED", "incomplete": "INCOMPLETE"}


def markdown(data: Mapping[str, Any], *, kill_matrix: Mapping[str, Any] | None = None) -> str:
    """Evidence as Markdown; with the kill matrix, if there is one."""
    parts = [
        f"# {_WORD[data['verdict']]}: {plain(data['counts'])}",
        f"`{_code(' '.join(data['command']))}`, started {data['started']}, {data['seconds']:.0f} s",
        "## By model and check",
        markdown_table(*by_check(data)),
    ]
    heat = by_layout(data)
    if heat.rows:
        cells = [[short(cell.value) for cell in row] for row in heat.cells]
        parts += [
            "## Excess error of the logits by layout",
            "Largest distance from the float64 oracle, the reference's own being 1.",
            markdown_table(["model", *heat.columns], _rows(heat.rows, cells)),
        ]
    broken = failures(data)
    if broken:
        parts.append("## What failed")
        parts += [_failure(case) for case in broken]
    if kill_matrix is not None:
        parts += ["## Kill matrix", _matrix(kill_matrix)]
    parts += [
        "## Inputs",
        markdown_table(
            ["model", "configuration", "weight files", "bytes"],
            [
                [
                    name,
                    found["config_sha256"][:16],
                    str(len(found["weight_files"])),
                    str(sum(one["bytes"] for one in found["weight_files"].values())),
                ]
                for name, found in data["inputs"].items()
            ],
        ),
        "## Limits",
        markdown_table(
            ["limit", "dtype", "value", "unit"],
            [
                [one["name"], one["dtype"], f"{one['limit']:g}", limit_unit(one)]
                for one in data["thresholds"]
            ],
        ),
        "## Made with",
        _made_with(data),
    ]
    return "\n\n".join(parts) + "\n"


def _failure(case: Mapping[str, Any]) -> str:
    lines = [f"- **{plain(case['id'])}**: {plain(case['summary'])}"]
    lines += [f"  - {plain(place)}" for place in case.get("places", ())]
    return "\n".join(lines)


def _matrix(data: Mapping[str, Any]) -> str:
    survivors = data["survivors"]
    said = f"{len(data['faults'])} faults, {len(survivors)} survivors"
    if survivors:
        said += f": {', '.join(plain(name) for name in survivors)}"
    rows = [[fault, *("x" if killed else "" for killed in row)] for fault, row in matrix_rows(data)]
    return f"{said}\n\n{markdown_table(['fault', *data['checks']], rows)}"


def matrix_markdown(matrix: Mapping[str, Any]) -> str:
    """A kill matrix by itself; what a dtype alone lets through is named."""
    survivors, faults = matrix["survivors"], matrix["faults"]
    verdict = f"FAILED, {plain(', '.join(survivors))} survived" if survivors else "PASSED"
    killed = f"{len(faults) - len(survivors)} of {len(faults)} faults killed"
    by = f"{len(matrix['checks'])} checks on {plain(', '.join(matrix['toys']))}"
    parts = [f"# {verdict}: {killed} by {by}"]
    for dtype, killers in matrix["killed_by_dtype"].items():
        alive = [name for name, found in killers.items() if not found]
        rest = f"; these survived: {plain(', '.join(alive))}" if alive else ""
        parts.append(f"In {dtype} alone: {len(killers) - len(alive)} killed{rest}.")
    alone = {check: names for check, names in matrix["only_killed_by"].items() if names}
    parts += [
        "## What only one check kills, in some dtype and on some toy",
        markdown_table(
            ["check", "faults"], [[check, ", ".join(names)] for check, names in alone.items()]
        ),
    ]
    for dtype, killers in matrix["killed_by_dtype"].items():
        parts += [
            f"## Killed by, in {dtype}",
            markdown_table(
                ["fault", "stands for", "killed by"],
                [
                    [name, matrix["stands_for"][name], ", ".join(found) or "nothing"]
                    for name, found in killers.items()
                ],
            ),
        ]
    return "\n\n".join(parts) + "\n"


def _made_with(data: Mapping[str, Any]) -> str:
    environment, hardware = data["environment"], data["hardware"]
    versions = {"nemotron-bridge": environment["nemotron-bridge"], **environment["versions"]}
    items = [f"{name} {version}" for name, version in versions.items() if version]
    items += [f"Python {environment['python']}", f"code {data['code_sha256'][:16]}"]
    items.append(
        f"{hardware['cpu']}, {hardware['cores']} cores, {gib(hardware['memory_bytes'])}"
        + "".join(f", {name}" for name in hardware["gpus"])
    )
    items += [
        f"float32 products by {name}: {error:.1f} ulp off, so not TF32"
        for name, error in hardware.get("float32_product_ulp", {}).items()
    ]
    return "\n".join(f"- {plain(item)}" for item in items)


def _rows(names: Iterable[str], cells: Iterable[Sequence[str]]) -> list[list[str]]:
    return [[name, *row] for name, row in zip(names, cells, strict=True)]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain text."""
    first, *rest = [[plain(cell) for cell in line] for line in (header, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (first, ["---"] * len(first), *rest))


def plain(text: str) -> str:
    """Text that Markdown takes for nothing else."""
    return _SPECIAL.sub(r"\\\1", visible(" ".join(text.split())))


def _code(text: str) -> str:
    return visible(text).replace("`", "'")
