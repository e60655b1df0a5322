"""Spreads and lines against numbers worked out by hand."""

from __future__ import annotations

import pytest

from harness.benchmarks.arithmetic import StreamBounds, fit, forward_flops, spread


@pytest.mark.parametrize(
    ("samples", "expected"),
    [((2.0, 3.0, 2.5), 0.4), ((1.0, 1.0, 1.0), 0.0), ((5.0,), 0.0), ((), 0.0), ((0.0, 0.0), 0.0)],
)
def test_the_spread_is_the_range_as_a_share_of_the_median(
    samples: tuple[float, ...], expected: float
) -> None:
    """(3 - 2) / 2.5; nothing varies where there is one sample or none."""
    assert spread(samples) == pytest.approx(expected)


def test_a_straight_line_is_found_exactly() -> None:
    """0.5 s and 2 s per GB."""
    line = fit([0.5, 2.0, 8.0], [1.5, 4.5, 16.5])
    assert line is not None
    assert line.fixed_seconds == pytest.approx(0.5)
    assert line.seconds_per_gb == pytest.approx(2.0)
    assert line.r_squared == pytest.approx(1.0)
    assert line.worst_deviation == pytest.approx(0.0, abs=1e-12)


def test_least_squares_by_hand() -> None:
    """Points (0, 1), (1, 2), (2, 6): slope 5/2, intercept 1/2, residuals 1/2, -1, 1/2.

    Their squares sum to 3/2, those around the mean of 3 to 14; the worst is 1 of 3 at size 1 and
    1/2 of 1/2 at size 0.
    """
    line = fit([0.0, 1.0, 2.0], [1.0, 2.0, 6.0])
    assert line is not None
    assert line.seconds_per_gb == pytest.approx(2.5)
    assert line.fixed_seconds == pytest.approx(0.5)
    assert line.r_squared == pytest.approx(1 - 1.5 / 14)
    assert line.worst_deviation == pytest.approx(1.0)


def test_two_sizes_make_no_line() -> None:
    """Any two points lie on one."""
    assert fit([1.0, 2.0, 2.0], [1.0, 2.0, 2.1]) is None


def test_the_operations_of_a_forward_pass_by_hand() -> None:
    """Two sequences of three tokens, seven parameters, two layers of width five.

    2 * 7 * 6 for the weights. A causal square has half of 3 * 3 scores, each of which takes
    2 * 5 operations, and as many again to mix: 2 * 90 in all, over sequences and layers.
    """
    found = forward_flops(parameters=7, batch=2, sequence=3, attention_width=5, num_layers=2)
    assert found == 84 + 2 * 2 * 2 * 2 * 5 * 9 / 2


def test_streaming_takes_what_its_slowest_part_takes() -> None:
    """Six parameters and ten tokens: 96 bytes, three passes of 120 operations, and two."""
    rates = {"bytes_per_second": 24.0, "flop_per_second": 36.0, "host_flop_per_second": 60.0}
    found = StreamBounds.of(parameters=6, tokens=10, itemsize=4, **rates)
    assert (found.memory, found.products, found.oracle) == (4.0, 10.0, 4.0)
    assert found.largest == 10.0
    slow = StreamBounds.of(
        parameters=6, tokens=10, itemsize=4, **rates | {"host_flop_per_second": 20.0}
    )
    assert slow.largest == 12.0
    far = StreamBounds.of(parameters=6, tokens=10, itemsize=4, **rates | {"bytes_per_second": 6.0})
    assert far.largest == 16.0
