"""The JSON document: its verdicts, and a form that does not change unnoticed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

import harness.benchmarks.results
from harness.benchmarks.results import Limit, Measurement, fits, not_run, notes

SCHEMA = Path(harness.benchmarks.results.__file__).with_name("bench.schema.json")


@pytest.mark.parametrize(("value", "met"), [(1.49, True), (1.5, True), (1.51, False)])
def test_a_limit_is_what_a_value_may_be_at_most(value: float, met: bool) -> None:  # noqa: FBT001
    """Equal is kept."""
    assert Limit(name="ratio_to_cp", value=value, limit=1.5).met is met


def test_the_median_is_the_one_in_the_middle() -> None:
    """Whatever the order of the runs; between the two in the middle of an even number."""
    assert Measurement(group="g", name="n", samples=(9.0, 1.0, 2.0)).median_seconds == 2.0
    assert Measurement(group="g", name="n", samples=(4.0, 1.0, 2.0, 9.0)).median_seconds == 3.0
    assert Measurement(group="g", name="n").median_seconds is None


def test_counts_tell_failures_from_what_was_left_out(data: dict[str, Any]) -> None:
    """Seven, one and one; the ratios are 4, 1.75 and 1.1875, and memory is 60 MiB too much."""
    assert data["counts"] == {
        "measured": 7, "failed": 1, "not_run": 1, "limits_met": 1, "limits_not_met": 3,
    }  # fmt: skip


def test_the_lines_are_those_of_the_sizes(measurements: list[Measurement]) -> None:
    """0.5 s more than half a second per GB: import; half a second per GB: cp."""
    found = fits(measurements)
    assert set(found) == {"cp -r", "import --verify none"}
    assert found["cp -r"].seconds_per_gb == pytest.approx(0.5)
    assert found["import --verify none"].fixed_seconds == pytest.approx(0.75)
    assert found["import --verify none"].seconds_per_gb == pytest.approx(0.5)


def test_a_cp_that_varies_tells_of_a_noisy_machine(measurements: list[Measurement]) -> None:
    """0.9 to 1.5 of the median is 60 %; a conversion that varies says nothing of the machine."""
    assert notes(measurements) == ["noisy machine: cp itself varied by up to 60% with a warm cache"]
    assert notes([one for one in measurements if one.name != "cp -r"]) == []
    calm = Measurement(group="sizes", name="cp -r", samples=(1.0, 1.0, 1.25))
    assert notes([calm]) == []
    read = Measurement(
        group="load", name="read, 4 at once", conditions={"cache": "cold"}, samples=(1.0, 2.0)
    )
    assert notes([read]) == ["noisy machine: read itself varied by up to 67% with a cold cache"]


def test_what_was_not_run_says_why() -> None:
    """And is no failure."""
    (found,) = not_run("workers", "import", "no --workers")
    assert (found.status, found.reason, found.samples) == ("not run", "no --workers", ())


def test_the_schema_is_a_schema_and_takes_the_document(data: dict[str, Any]) -> None:
    """Which survives being written."""
    schema = json.loads(SCHEMA.read_text("utf-8"))
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(json.loads(json.dumps(data)))


def test_the_form_is_version_1(data: dict[str, Any]) -> None:
    """A reader of version 1 finds these keys; whoever changes them changes the version."""
    assert data["schema_version"] == 1
    assert list(data) == [
        "schema_version", "started", "seconds", "command", "profile", "machine", "environment",
        "code_sha256", "counts", "notes", "fits", "measurements",
    ]  # fmt: skip
    assert data["measurements"][1] == {
        "group": "sizes",
        "name": "import --verify none",
        "conditions": {"size_bytes": 500_000_000, "cache": "warm"},
        "status": "measured",
        "reason": "",
        "samples": [1.0, 1.0, 1.0],
        "median_seconds": 1.0,
        "spread": 0.0,
        "values": {"ratio_to_cp": 4.0, "peak_rss_bytes": 2.0**30, "gb_per_second": 0.5},
        "limits": [{"name": "ratio_to_cp", "value": 4.0, "limit": 1.5, "met": False}],
    }


def _drop(data: dict[str, Any]) -> None:
    del data["machine"]["cpu"]


def _add(data: dict[str, Any]) -> None:
    data["measurements"][0]["more"] = 1


def _lose_reason(data: dict[str, Any]) -> None:
    data["measurements"][-1]["reason"] = ""


def _lose_samples(data: dict[str, Any]) -> None:
    data["measurements"][0]["samples"] = []


def _age(data: dict[str, Any]) -> None:
    data["schema_version"] = 2


@pytest.mark.parametrize("spoil", [_drop, _add, _lose_reason, _lose_samples, _age])
def test_the_schema_refuses(data: dict[str, Any], spoil: Callable[[dict[str, Any]], None]) -> None:
    """What a reader could not rely on."""
    spoilt = copy.deepcopy(data)
    spoil(spoilt)
    with pytest.raises(ValidationError):
        Draft202012Validator(json.loads(SCHEMA.read_text("utf-8"))).validate(spoilt)
