"""Measurements as rows: on the terminal, and as Markdown for a page of the documentation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from bridge.console import gib, table
from harness.report.markdown import markdown_table, plain

COLUMNS: Final = (
    "group", "what", "with", "median", "spread", "GB/s", "x cp", "peak memory", "also", "limits",
)  # fmt: skip
_RIGHT: Final = ("median", "spread", "GB/s", "x cp", "peak memory")


def _flops(value: float) -> str:
    """Of GFLOP/s, for people."""
    return f"{value:.1f} GFLOP/s" if value < 10_000 else f"{value / 1000:.1f} TFLOP/s"


_ALSO: Final[Mapping[str, Callable[[float], str]]] = {
    "ratio_to_read": lambda value: f"{value:.2f} x read",
    "ratio_to_load_file": lambda value: f"{value:.2f} x load_file",
    "built_ratio_to_load_file": lambda value: f"with building {value:.2f} x load_file",
    "share_of_host_copy": lambda value: f"{value:.0%} of the copy from pinned memory",
    "ratio_to_hf": lambda value: f"{value:.2f} x Hugging Face",
    "share_of_bound": lambda value: f"{_share(value)} of what is possible",
    "share_of_copy": lambda value: f"{_share(value)} of the card's copy",
    "convert_seconds": lambda value: f"converting {value:.2f} s",
    "verify_seconds": lambda value: f"verifying {value:.2f} s",
    "verify_ratio_to_cp": lambda value: f"verifying {value:.2f} x cp",
    "added_ratio_to_cp": lambda value: f"{value:.2f} x cp more than without",
    "ratio_to_cp_on_disk": lambda value: f"{value:.2f} x cp on disk",
    "start_seconds": lambda value: f"start {value:.1f} s",
    "build_seconds": lambda value: f"building {value:.1f} s",
    "load_seconds": lambda value: f"loading {value:.2f} s",
    "load_ratio_to_cp": lambda value: f"loading {value:.2f} x cp",
    "model_bytes": lambda value: f"model {gib(value)}",
    "cases": lambda value: f"{value:.0f} cases",
    "slowest_seconds": lambda value: f"slowest {value:.2f} s",
    "total_seconds": lambda value: f"{value:.1f} s in all",
    "tokens": lambda value: f"{value:.0f} tokens",
    "parameters": lambda value: f"{value / 1e9:.3f} G parameters",
    "parameters_per_second": lambda value: f"{value / 1e6:.0f} M parameters/s",
    "token_parameters_per_second": lambda value: f"{value / 1e9:.2f} G tokens x parameters/s",
    "tokens_per_second": lambda value: f"{value:.0f} tokens/s",
    "gflop_per_second": _flops,
    "matmul_gflop_per_second": lambda value: f"matmul {_flops(value)}",
    "share_of_matmul": lambda value: f"{_share(value)} of matmul",
    "share_of_host_matmul": lambda value: f"{_share(value)} of the host's matmul",
    "float32_product_ulp": lambda value: f"products within {value:.1f} ulp",
    "logits_difference": lambda value: f"logits differ by {value:.1e}",
}
_LIMITS: Final[Mapping[str, tuple[str, Callable[[float], str]]]] = {
    "ratio_to_cp": ("time", lambda value: f"{value:.2f} x cp"),
    "added_ratio_to_cp": ("verifying", lambda value: f"{value:.2f} x cp"),
    "peak_rss_bytes": ("memory", gib),
    "median_seconds": ("time", lambda value: f"{value:.2f} s"),
}


def rows(data: Mapping[str, Any]) -> list[list[str]]:
    """One row of `COLUMNS` per measurement."""
    return [_row(one) for one in data["measurements"]]


def _row(one: Mapping[str, Any]) -> list[str]:
    values, head = one["values"], [one["group"], one["name"], _conditions(one["conditions"])]
    if one["status"] != "measured":
        return [*head, "", "", "", "", "", f"{one['status']}: {one['reason']}", ""]
    return [
        *head,
        _seconds(one["median_seconds"]),
        # Cases of a check are different work, and differ.
        f"{one['spread']:.0%}" if len(one["samples"]) > 1 and "cases" not in values else "",
        _number(values.get("gb_per_second")),
        _number(values.get("ratio_to_cp")),
        gib(values["peak_rss_bytes"]) if "peak_rss_bytes" in values else "",
        ", ".join(say(values[name]) for name, say in _ALSO.items() if name in values),
        ", ".join(limit_text(limit) for limit in one["limits"]),
    ]


def limit_text(limit: Mapping[str, Any]) -> str:
    """What is limited, to what, and the verdict."""
    called, say = _LIMITS[limit["name"]]
    verdict = "met" if limit["met"] else "NOT MET"
    return f"{called} <= {say(limit['limit'])} {verdict}"


def _conditions(found: Mapping[str, Any]) -> str:
    parts = []
    if "size_bytes" in found:
        parts.append(f"{found['size_bytes'] / 1e9:.2f} GB")
    if found.get("cache") == "cold":
        parts.append("cold")
    if "memory_budget_bytes" in found:
        parts.append(f"budget {gib(found['memory_budget_bytes'])}")
    if "workers" in found:
        parts.append(f"--workers {found['workers']}")
    if "batch" in found:
        parts.append(f"{found['batch']} x {found['sequence']} tokens")
    if "dtype" in found:
        parts.append(str(found["dtype"]))
    return ", ".join(parts)


def _seconds(value: float) -> str:
    if value < 0.1:
        return f"{value * 1e3:.1f} ms"
    return f"{value:.2f} s" if value < 100 else f"{value:.0f} s"


def _share(value: float) -> str:
    """In per cent; small ones with a digit more."""
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def summary(data: Mapping[str, Any]) -> list[str]:
    """What the table does not say: the lines by size, the limits missed, the machine's noise."""
    found = [
        f"{name} by size: {line['fixed_seconds']:.2f} s + {line['seconds_per_gb']:.2f} s/GB, "
        f"R^2 {line['r_squared']:.4f}, no point further off than {line['worst_deviation']:.0%}"
        for name, line in data["fits"].items()
    ]
    found += data["notes"]
    found += [
        f"{one['group']}: "
        + ", ".join(filter(None, (one["name"], _conditions(one["conditions"]))))
        + f": {limit_text(limit)}, is "
        + _LIMITS[limit["name"]][1](limit["value"])
        for one in data["measurements"]
        for limit in one["limits"]
        if not limit["met"]
    ]
    counts = data["counts"]
    found.append(
        f"{counts['measured']} measured, {counts['failed']} failed, {counts['not_run']} not run; "
        f"limits: {counts['limits_met']} met, {counts['limits_not_met']} not met"
    )
    return found


def machine(data: Mapping[str, Any]) -> list[str]:
    """What the figures are of."""
    hardware, environment = data["machine"], data["environment"]
    versions = {"nemotron-bridge": environment["nemotron-bridge"], **environment["versions"]}
    load = ", ".join(f"{one:.1f}" for one in hardware["load_average"])
    return [
        f"{hardware['cpu']}, {hardware['cores']} cores, {gib(hardware['memory_bytes'])}"
        + "".join(f", {name}" for name in hardware["gpus"])
        + "".join(
            f", {name} {hardware[key]}"
            for name, key in (("driver", "gpu_driver"), ("CUDA", "cuda"))
            if hardware.get(key)
        ),
        f"{hardware['system']}, {hardware['filesystem']}, load {load} at the end",
        f"Python {environment['python']}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        f"{data['profile']['name']}, {data['started']}, {data['seconds']:.0f} s, code "
        + data["code_sha256"][:16],
    ]


def print_results(data: Mapping[str, Any], console: Console) -> None:
    """The table in the house style, then what it does not say."""
    shown = table(*COLUMNS, right=_RIGHT)
    for row, one in zip(rows(data), data["measurements"], strict=True):
        bad = one["status"] == "failed" or not all(limit["met"] for limit in one["limits"])
        shown.add_row(*row, style="bold red" if bad else None)
    console.print(shown)
    console.print()
    for line in [*machine(data), *summary(data)]:
        console.print(Text(line))


def markdown(data: Mapping[str, Any], plots: Iterable[tuple[str, str]] = ()) -> str:
    """The same as Markdown.

    Args:
        data: Results, valid by the schema.
        plots: Title and file name of each figure that lies beside the page.
    """
    parts = [
        "\n".join(f"- {plain(line)}" for line in machine(data)),
        markdown_table(COLUMNS, [[_typeset(cell) for cell in row] for row in rows(data)]),
        "\n".join(f"- {plain(_typeset(line))}" for line in summary(data)),
        *(f"![{title}]({file})" for title, file in plots),
    ]
    return "\n\n".join(parts) + "\n"


def _typeset(text: str) -> str:
    return text.replace("<=", "≤")
