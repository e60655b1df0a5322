"""Evidence fits its published schema, and nothing that does not is taken for evidence."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge.errors import BridgeError
from bridge.outputs import write_atomically
from harness.compare import Finding
from harness.errors import EvidenceError
from harness.report import machine
from harness.report.digests import code_sha256, digest_of, identity
from harness.report.evidence import (
    case_as_data,
    read_evidence,
    result_from_data,
    strict,
    to_json,
    validate,
)
from harness.runner import Result
from harness.suite import Case
from harness.toys import TOYS

Make = Callable[..., dict[str, Any]]


def test_evidence_holds_every_value_as_strict_json(make_evidence: Make) -> None:
    """NaN is a word: any reader takes the document."""
    read = json.loads(to_json(make_evidence()), parse_constant=pytest.fail)
    assert read["verdict"] == "failed"
    assert read["totals"] == {"passed": 4, "failed": 2, "error": 1, "not run": 1}
    values = {one["id"]: one.get("value") for one in read["cases"]}
    assert values["logits/tied/tp2-pp1/float32/long"] == 37.5
    assert values["logits/puzzle/tp2-pp1/float32/long"] == "nan"
    assert {one["name"] for one in read["thresholds"]} >= {
        "logits.excess",
        "logits.reference_error",
    }
    assert all(one["measured"] and one["command"] for one in read["thresholds"])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 1),
        (("verdict",), "fine"),
        (("started",), "yesterday"),
        (("novel",), True),
        (("command",), []),
        (("cases",), []),
        (("cases", 0, "status"), "skipped"),
        (("cases", 0, "value"), "large"),
        (("cases", 0, "novel"), 1),
        (("inputs", "tied/float32", "config_sha256"), "abc"),
        (("thresholds", 0, "measured"), {}),
        (("hardware", "cores"), 0),
    ],
)
def test_the_schema_refuses_what_is_no_evidence(
    make_evidence: Make, path: tuple[Any, ...], value: object
) -> None:
    """One thing changed at a time, and named."""
    data = json.loads(to_json(make_evidence()))
    validate(data)
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(EvidenceError, match="HN103") as caught:
        validate(data)
    assert caught.value.where


def test_a_verdict_without_its_measurement_is_no_evidence(make_evidence: Make) -> None:
    """A case that passed says what it found."""
    data = json.loads(to_json(make_evidence()))
    del data["cases"][0]["details"]
    with pytest.raises(EvidenceError, match="details"):
        validate(data)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"schema_version": 2}'])
def test_a_file_that_is_no_evidence_is_one_error(tmp_path: Path, text: str | None) -> None:
    """Missing, torn, or something else."""
    if text is not None:
        (tmp_path / "evidence.json").write_text(text, "utf-8")
    with pytest.raises(BridgeError, match="HN103"):
        read_evidence(tmp_path)


def test_a_pipe_in_the_place_of_evidence_is_one_error(tmp_path: Path) -> None:
    """Nobody writes to it, and nobody waits."""
    os.mkfifo(tmp_path / "evidence.json")
    with pytest.raises(BridgeError, match="HN103"):
        read_evidence(tmp_path)


def test_a_result_survives_the_way_through_json(run_results: list[Result]) -> None:
    """The journal gives back what was put in, NaN included."""
    for result in run_results:
        back = result_from_data(json.loads(json.dumps(strict(case_as_data(result)))))
        assert back.case == result.case
        assert (back.status, back.summary, back.traceback) == (
            result.status,
            result.summary,
            result.traceback,
        )
        assert (back.finding is None) == (result.finding is None)
        if back.finding is not None and result.finding is not None:
            assert back.finding.places == result.finding.places
            assert str(back.finding.value) == str(result.finding.value)
            assert back.finding.limit == result.finding.limit


def test_numbers_of_numpy_stay_numbers() -> None:
    """A check may leave some in its details."""
    finding = Finding(
        passed=True, summary="", details={"n": np.int64(3), "x": np.float32(0.5), "bad": -math.inf}
    )
    case = Case(check="config", model="tied", dtype="float32")
    data = strict(case_as_data(Result(case=case, status="passed", finding=finding)))
    assert data["details"] == {"n": 3, "x": 0.5, "bad": "-inf"}


def test_inputs_are_known_by_the_bytes_of_every_file(tmp_path: Path) -> None:
    """Configuration, every shard, and every file of the Megatron side."""
    hf, megatron = tmp_path / "hf", tmp_path / "megatron"
    (megatron / "iter_0000000").mkdir(parents=True)
    hf.mkdir()
    (hf / "config.json").write_bytes(b"{}")
    (hf / "model.safetensors").write_bytes(b"weights")
    (megatron / "iter_0000000" / "__0_0.distcp").write_bytes(b"shards")
    read: list[int] = []
    found = identity(hf, megatron, advance=read.append)
    sha = {text: hashlib.sha256(text).hexdigest() for text in (b"{}", b"weights", b"shards")}
    assert found == {
        "config_sha256": sha[b"{}"],
        "weight_files": {"model.safetensors": {"bytes": 7, "sha256": sha[b"weights"]}},
        "megatron_files": {"iter_0000000/__0_0.distcp": {"bytes": 6, "sha256": sha[b"shards"]}},
    }
    assert sum(read) == 13


def test_an_input_says_what_it_is_made_of(tmp_path: Path) -> None:
    """For pictures; valid by the schema. `{}`, as above, is no configuration, and says nothing."""
    (tmp_path / "config.json").write_text(json.dumps(TOYS["puzzle"].config))
    found = identity(tmp_path)["architecture"]
    assert [one["attention"] for one in found["blocks"]] == [
        "full", "full", "no_op", "full", "linear", "no_op", "full",
    ]  # fmt: skip
    assert found["blocks"][3]["ffn"] == "linear"


def test_digests_do_not_depend_on_order_and_see_every_change() -> None:
    """Of data and of code."""
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})
    assert code_sha256() == code_sha256()


def test_memory_is_that_of_this_process_and_of_what_it_starts() -> None:
    """A peak is no less than what is resident now."""
    watch = machine.MemoryWatch()
    watch.look(now=True)
    resident = int(Path("/proc/self/statm").read_text("utf-8").split()[1]) * os.sysconf(
        "SC_PAGESIZE"
    )
    assert watch.peaks()["main_bytes"] >= 0.5 * resident
    assert machine.hardware()["cores"] >= 1


def test_cores_are_those_that_the_process_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's share of a machine; where the system does not tell, all."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 5, 7}, raising=False)
    assert machine.usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.usable_cores() == 64


def test_a_report_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole or not at all, and no litter."""
    path = tmp_path / "report.md"
    write_atomically(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text("utf-8") == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["report.md"]
