"""Files of the harness's own that somebody has damaged: found by `nemotron-bridge fuzz`."""

from __future__ import annotations

import io
import json
import math
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge.errors import BridgeError, LayoutError
from bridge.pipeline import parse_layout
from bridge.storage.remote import RemotePath, parse_location
from bridge.storage.remote_target import MARKER_NAME, new_prefix
from bridge.storage.unpickle import unpickle_object
from harness.detached import Provenance, read_reference
from harness.faults.journal import UnitJournal
from harness.golden.store import load_index
from harness.layouts import read_layouts
from harness.logits_file import read_input
from harness.qualify.suites import load_variant
from harness.replay import load_replay
from harness.report.evidence import number
from harness.report.journal import Journal
from harness.streaming.record import FILE_NAME, Record, Store
from harness.suite import load_suite
from harness.thresholds import load_thresholds

DEEP = "[" * 20_000 + "]" * 20_000
LIMIT: dict[str, Any] = {
    "name": "n", "dtype": "float32", "limit": 2.0, "unit": "u", "measured": {"a": 1},
    "command": "c",
}  # fmt: skip


def suite(path: Path) -> object:
    """A suite by its path."""
    return load_suite(str(path))


def variant(path: Path) -> object:
    """A variant by its path."""
    return load_variant(str(path))


@pytest.mark.parametrize("read", [load_thresholds, read_layouts, suite, variant])
@pytest.mark.parametrize("data", [b"\xff", b"a = ", f"a = {DEEP}".encode(), None])
def test_what_is_no_toml_is_refused(
    read: Callable[[Path], object], data: bytes | None, tmp_path: Path
) -> None:
    """No UTF-8, no TOML, too many brackets, no file: an error with a code, naming the file."""
    path = tmp_path / "x.toml"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(BridgeError) as caught:
        read(path)
    assert str(path) in caught.value.where


@pytest.mark.parametrize(
    "text",
    [
        "threshold = 3",
        "threshold = [3]",
        "[threshold]\na = 1",
        *(
            "[[threshold]]\n"
            + "\n".join(f"{name} = {json.dumps(one)}" for name, one in changed.items())
            for changed in (
                LIMIT | {"name": ["n"], "measured": 1},
                LIMIT | {"limit": 10**400, "measured": 1},
                LIMIT | {"limit": "2", "measured": 1},
            )
        ),
    ],
)
def test_limits_of_another_type_are_refused(text: str, tmp_path: Path) -> None:
    """No table, a name that is a list, a limit beyond any float, a limit that is text."""
    path = tmp_path / "thresholds.toml"
    path.write_text(f"schema_version = 1\n{text}\n", "utf-8")
    with pytest.raises(BridgeError):
        load_thresholds(path)


def test_json_that_nests_without_end_is_refused(tmp_path: Path) -> None:
    """By the readers of goldens and of replays; an index and a case of some kilobytes."""
    (tmp_path / "index.json").write_text(f'{{"version": {DEEP}}}', "utf-8")
    with pytest.raises(BridgeError, match="not a golden"):
        load_index(tmp_path)
    (tmp_path / "replay.json").write_text(f'{{"schema_version": {DEEP}}}', "utf-8")
    with pytest.raises(BridgeError, match="not a replay"):
        load_replay(tmp_path)


UNIT: dict[str, Any] = {
    "fault": "rope-theta", "toy": "tied", "dtype": "float32", "killed_by": ["logits"],
    "looked": ["logits"], "first": "", "seconds": 1.0, "seconds_by_check": {"logits": 1.0},
}  # fmt: skip


@pytest.mark.parametrize(
    "lines",
    [
        ['{"identity": 3}'],
        ['{"identity": null}'],
        ['{"identity": {"cases": [[1], {}]}}'],
        [f'{{"identity": {DEEP}}}'],
        *(
            ['{"identity": {"cases": [1]}}', json.dumps(UNIT | changed)]
            for changed in (
                {"fault": ["rope-theta"]},
                {"killed_by": 3},
                {"looked": [["logits"]]},
                {"seconds": "1"},
                {"seconds_by_check": {"logits": None}},
                {"seconds_by_check": [1]},
            )
        ),
    ],
)
def test_a_kill_matrix_that_makes_no_sense_is_not_resumed(lines: list[str], tmp_path: Path) -> None:
    """HN102, before anything of it is believed; the journal itself stays as it is."""
    path = tmp_path / "faults.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    before = path.read_bytes()
    with pytest.raises(BridgeError) as caught:
        UnitJournal.resume(tmp_path, {"cases": [1]})
    assert caught.value.code == "HN102"
    assert before == path.read_bytes()


def test_a_journal_of_brackets_is_not_resumed(tmp_path: Path) -> None:
    """Python's reader would end in a RecursionError."""
    (tmp_path / "journal.jsonl").write_text(f'{{"journal": {DEEP}}}\n', "utf-8")
    with pytest.raises(BridgeError, match="cannot be read"):
        Journal.resume(tmp_path, {})


def test_numbers_beyond_any_float_are_infinite() -> None:
    """As 1e400 is; an integer of as many digits had ended `diff` and `--resume` in a traceback."""
    assert number(10**400) == math.inf
    assert number(-(10**400)) == -math.inf
    assert number("nan") is not None
    assert number(0.5) == 0.5


@pytest.mark.parametrize("read", [read_input, read_reference])
def test_more_dimensions_than_numpy_has_are_refused(
    read: Callable[[Path], object], tmp_path: Path
) -> None:
    """The safetensors library takes them, and NumPy's ValueError had come through."""
    name, dtype, size = ("input_ids", "I64", 8) if read is read_input else ("logits", "F32", 4)
    entry = {"dtype": dtype, "shape": [1] * 102, "data_offsets": [0, size]}
    metadata = Provenance(
        config_sha256=None, spec_sha256="1", weights_sha256="2", inputs_sha256="3",
        dtype="float32", device="cpu", implementation="x",
    ).to_metadata()  # fmt: skip
    header = json.dumps({"__metadata__": metadata, name: entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(BridgeError, match="cannot read the"):
        read(path)


def test_values_of_a_pickle_that_nest_too_deeply_are_refused() -> None:
    """Whoever shows one would end in a RecursionError."""
    with pytest.raises(BridgeError, match="deep"):
        unpickle_object(b"\x80\x02" + b"]" * 900 + b"a" * 899 + b".", where="common.pt")


def npy(array: np.ndarray[Any, Any], *, shape: str | None = None) -> bytes:
    """An array's bytes, perhaps with another shape in its header."""
    out = io.BytesIO()
    np.save(out, array)
    data = out.getvalue()
    return data if shape is None else data.replace(f"({array.size},)".encode(), shape.encode())


def document(**changed: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    """What `Store` keeps of a walk that has measured nothing."""
    plain = {"version": 1, "identity": {}, "next_segment": 1, "judgements": {}, "parts": {}}
    return plain | changed


def as_npy(value: object) -> bytes:
    """JSON as an array of bytes."""
    return npy(np.frombuffer(json.dumps(value).encode(), np.uint8))


@pytest.mark.parametrize(
    "entries",
    [
        {"document.npy": b""},
        {"document.npy": npy(np.zeros(7, np.uint8), shape="(7)")},
        {"document.npy": as_npy(3)},
        {"document.npy": as_npy(document(next_segment="1"))},
        {"document.npy": as_npy(document(next_segment=-1))},
        {"document.npy": as_npy(document(judgements={"short": [{}]}))},
        {"document.npy": as_npy(document(judgements=[]))},
        {"document.npy": as_npy(document()), "short.npy": npy(np.zeros(7), shape="(9**9,)")},
        {"document.npy": as_npy(document()), "short.npy": npy(np.zeros(7)).replace(b"f8", b"O8")},
    ],
)
def test_a_damaged_record_of_a_walk_is_left_aside(
    entries: dict[str, bytes], tmp_path: Path
) -> None:
    """There is nothing to go on from, and no memory is taken for what a header claims."""
    Store(tmp_path, {}).save(1, Record(), {})
    assert Store(tmp_path, {}).load(dtype="float32", thresholds=load_thresholds()) is not None
    with zipfile.ZipFile(tmp_path / FILE_NAME, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    assert Store(tmp_path, {}).load(dtype="float32", thresholds=load_thresholds()) is None


def test_a_compressed_record_of_a_walk_is_left_aside(tmp_path: Path) -> None:
    """A megabyte of zip can be a gigabyte of array."""
    with zipfile.ZipFile(tmp_path / FILE_NAME, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("document.npy", as_npy(document()))
    assert Store(tmp_path, {}).load(dtype="float32", thresholds=load_thresholds()) is None


HERE = socket.gethostname()


@pytest.mark.parametrize(
    "text",
    [DEEP, *(json.dumps({"host": HERE, "pid": pid}) for pid in (1 << 63, 1 << 31, 0, -1, True))],
)
def test_a_marker_of_no_process_says_nothing_and_is_a_marker(text: str, tmp_path: Path) -> None:
    """It marks what a killed upload has left, which the next attempt removes."""
    target = parse_location("memory://damaged/target")
    assert isinstance(target, RemotePath)
    target.fs.pipe_file(f"{target.path}/{MARKER_NAME}", text.encode())
    target.fs.pipe_file(f"{target.path}/left.distcp", b"x")
    with new_prefix(target, overwrite=False, staging=tmp_path, last=()):
        pass
    assert not target.fs.exists(f"{target.path}/left.distcp")


def test_a_layout_of_thousands_of_digits_is_none() -> None:
    """Python refuses to read such a number, with a bare ValueError."""
    with pytest.raises(LayoutError, match="BR200"):
        parse_layout(f"tp{'9' * 5000}-pp1", None)  # type: ignore[arg-type]  # it is not come to
