"""Table, Markdown and figures say what the results say."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise
from typing import Any

import pytest
from rich.console import Console

from harness.benchmarks.plots import Curve, Plot, plots, steps
from harness.benchmarks.results import Measurement
from harness.benchmarks.tables import COLUMNS, machine, markdown, print_results, rows, summary

SVG = "{http://www.w3.org/2000/svg}"


def test_a_row_shows_median_spread_rate_ratio_memory_and_verdict(data: dict[str, Any]) -> None:
    """The import of 2 GB: 1.75 s beside 1 s."""
    assert dict(zip(COLUMNS, rows(data)[3], strict=True)) == {
        "group": "sizes",
        "what": "import --verify none",
        "with": "2.00 GB",
        "median": "1.75 s",
        "spread": "0%",
        "GB/s": "1.14",
        "x cp": "1.75",
        "peak memory": "1.00 GiB",
        "also": "",
        "limits": "time <= 1.50 x cp NOT MET",
    }
    assert rows(data)[5][-1] == "time <= 1.50 x cp met"


def test_a_row_without_a_figure_says_why(data: dict[str, Any]) -> None:
    """A failure and an omission are not the same."""
    failed, left_out = rows(data)[-2:]
    assert failed[:2] + failed[8:] == ["load", "load", "failed: exit code 1: a | b", ""]
    assert left_out[8] == "not run: not installed"


def test_the_budget_is_part_of_the_row(data: dict[str, Any]) -> None:
    """And so is its limit, half a GiB above."""
    (row,) = [row for row in rows(data) if row[0] == "budgets"]
    assert row[2] == "8.00 GB, budget 0.12 GiB"
    assert row[-1] == "memory <= 0.62 GiB NOT MET"


def test_a_forward_pass_says_what_ran_and_ratios_come_first(data: dict[str, Any]) -> None:
    """Also where a share is small."""
    row = Measurement(
        group="forward", name="GPTModel, te layers",
        conditions={"size_bytes": 2 * 10**9, "batch": 8, "sequence": 2048, "dtype": "bfloat16"},
        samples=(0.25,),
        values={
            "tokens_per_second": 65536.0, "gflop_per_second": 412_000.0, "share_of_matmul": 0.516,
            "share_of_host_matmul": 0.0042, "ratio_to_hf": 0.875, "logits_difference": 0.00912,
        },
    )  # fmt: skip
    data["measurements"] = [row.to_dict()]
    (cells,) = rows(data)
    assert cells[2] == "2.00 GB, 8 x 2048 tokens, bfloat16"
    assert cells[8] == (
        "0.88 x Hugging Face, 65536 tokens/s, 412.0 TFLOP/s, 52% of matmul, "
        "0.4% of the host's matmul, logits differ by 9.1e-03"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.00142, "1.4 ms"),
        (0.0994, "99.4 ms"),
        (0.1, "0.10 s"),
        (99.9, "99.90 s"),
        (100.0, "100 s"),
    ],
)
def test_a_time_has_the_unit_that_shows_it(data: dict[str, Any], seconds: float, text: str) -> None:
    """A matrix product takes milliseconds."""
    data["measurements"] = [Measurement(group="g", name="n", samples=(seconds,)).to_dict()]
    assert rows(data)[0][COLUMNS.index("median")] == text


def test_a_gpu_is_named_with_its_driver_and_cuda(data: dict[str, Any]) -> None:
    """Where there is one."""
    assert machine(data)[0] == "A CPU, 2 cores, 16.00 GiB"
    data["machine"] |= {"gpus": ["A GPU"], "gpu_driver": "580.1", "cuda": "13.0"}
    assert machine(data)[0] == "A CPU, 2 cores, 16.00 GiB, A GPU, driver 580.1, CUDA 13.0"


def test_the_summary_has_lines_noise_misses_and_counts(data: dict[str, Any]) -> None:
    """In that order."""
    found = summary(data)
    assert found[1] == (
        "import --verify none by size: 0.75 s + 0.50 s/GB, R^2 1.0000, no point further off than 0%"
    )
    assert found[2].startswith("noisy machine")
    assert found[3] == (
        "sizes: import --verify none, 0.50 GB: time <= 1.50 x cp NOT MET, is 4.00 x cp"
    )
    assert found[-1] == "7 measured, 1 failed, 1 not run; limits: 1 met, 3 not met"


def test_the_terminal_gets_every_row(data: dict[str, Any]) -> None:
    """With the machine below it."""
    console = Console(width=240, record=True, file=None, quiet=False, markup=False)
    with console.capture() as captured:
        print_results(data, console)
    text = captured.get()
    for row in rows(data):
        assert any(all(cell in line for cell in row) for line in text.splitlines()), row
    assert "A CPU, 2 cores, 16.00 GiB" in text
    assert "torch 2.13.0" in text
    assert "transformer-engine" not in text


def test_markdown_is_a_table_of_as_many_columns_in_each_line(data: dict[str, Any]) -> None:
    """Also where a reason has a bar in it."""
    text = markdown(data, [("A figure", "figure.svg")])
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 9
    assert {line.replace(r"\|", "").count("|") for line in table} == {len(COLUMNS) + 1}
    assert "![A figure](figure.svg)" in text


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        (8.6, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (17.8, [0, 2, 4, 6, 8, 10, 12, 14, 16]),
        (0.05, [0, 0.01, 0.02, 0.03, 0.04, 0.05]),
    ],
)
def test_ticks_are_round_numbers(top: float, expected: list[float]) -> None:
    """From nothing to the top."""
    assert steps(top) == pytest.approx(expected)


def test_figures_are_of_what_was_measured(data: dict[str, Any]) -> None:
    """Time and memory by size; rate and memory by budget, with its limit."""
    found = {plot.file: plot for plot in plots(data)}
    assert set(found) == {
        "time-by-size.svg", "memory-by-size.svg", "rate-by-budget.svg", "memory-by-budget.svg",
    }  # fmt: skip
    by_size = {curve.name: curve.points for curve in found["time-by-size.svg"].curves}
    assert by_size["import --verify none"] == [(0.5, 1.0), (2.0, 1.75), (8.0, 4.75)]
    (limit,) = [curve for curve in found["memory-by-budget.svg"].curves if curve.limit]
    assert limit.points == [(float(128 << 20), 0.625)]
    data["measurements"] = []
    assert plots(data) == []


def test_a_figure_is_to_scale() -> None:
    """A point twice as far is drawn twice as far from the origin; all of it is in the frame."""
    curve = Curve(name="a < b", points=[(1.0, 1.0), (2.0, 2.0), (4.0, 4.0)])
    plot = Plot(file="f", title="T & t", x="x", y="y", curves=[curve])
    root = ET.fromstring(plot.svg())  # noqa: S314 - our own
    dots = root.findall(f".//{SVG}circle")
    xs = [float(dot.attrib["cx"]) for dot in dots]
    ys = [float(dot.attrib["cy"]) for dot in dots]
    assert xs[2] - xs[1] == pytest.approx(2 * (xs[1] - xs[0]), abs=0.2)
    assert ys[1] - ys[2] == pytest.approx(2 * (ys[0] - ys[1]), abs=0.2)
    width, height = (float(root.attrib[name]) for name in ("width", "height"))
    assert all(0 < x < width for x in xs)
    assert all(0 < y < height for y in ys)
    texts = [one.text for one in root.iter(f"{SVG}text")]
    assert "a < b" in texts
    assert "T & t" in texts


def test_budgets_are_evenly_apart_where_each_is_double_the_last() -> None:
    """A true scale would squeeze the small ones into one place."""
    curve = Curve(name="c", points=[(float(1 << power), 1.0) for power in (27, 28, 29, 30)])
    plot = Plot(file="f", title="T", x="x", y="y", curves=[curve], doubling=True)
    root = ET.fromstring(plot.svg())  # noqa: S314 - our own
    xs = [float(dot.attrib["cx"]) for dot in root.findall(f".//{SVG}circle")]
    gaps = [after - before for before, after in pairwise(xs)]
    assert gaps == pytest.approx([gaps[0]] * 3, abs=0.2)
    texts = [one.text for one in root.iter(f"{SVG}text")]
    assert {"128 MiB", "256 MiB", "512 MiB", "1 GiB"} <= set(texts)
