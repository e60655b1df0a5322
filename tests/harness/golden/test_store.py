"""Records on disk: whole or not at all, and nothing is taken that was edited or is of old."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bridge.outputs import write_atomically
from harness import locations
from harness.errors import GoldenFormatError
from harness.golden.store import (
    Index,
    index_text,
    load_index,
    load_record,
    record_text,
    sha256_of,
)

FIELDS: dict[str, Any] = {
    "plan": ["a <- b", "c" * 200],
    "logits": [[0.1, -1e-30], [1e300, 3]],
    "config": {"n": None, "é": [], "long": ["x" * 90, {"y": True}]},
}


def put(root: Path, text: str, *, digest: str | None = None) -> None:
    """A folder with one record called `one`."""
    (root / "cases").mkdir(exist_ok=True)
    write_atomically(root / "cases" / "one.json", text)
    found = digest or sha256_of(root / "cases" / "one.json")
    index = Index(
        recordings=[{"reason": "test"}],
        entries={"one": {"file": "cases/one.json", "sha256": found, "recording": 1}},
    )
    write_atomically(root / "index.json", index_text(index))


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Every value and its type, header and fields apart."""
    put(tmp_path, record_text({"name": "one", "dtype": "float32"}, FIELDS))
    found = load_record(tmp_path, "one")
    assert found is not None
    assert found.fields == FIELDS
    assert found.header == {"version": 1, "name": "one", "dtype": "float32"}
    assert load_record(tmp_path, "two") is None


def test_an_edited_record_is_refused(tmp_path: Path) -> None:
    """One digit is enough: a golden that was made to agree proves nothing."""
    put(tmp_path, record_text({"name": "one"}, FIELDS))
    path = tmp_path / "cases" / "one.json"
    path.write_text(path.read_text("utf-8").replace("0.1", "0.2"), "utf-8")
    with pytest.raises(GoldenFormatError, match="not what was recorded"):
        load_record(tmp_path, "one")


@pytest.mark.parametrize("text", ['{"version": 0}', "{}", "[]", "not JSON", '{"version": 2}'])
def test_another_format_is_one_clear_error(text: str, tmp_path: Path) -> None:
    """Records and index alike; never half understood."""
    put(tmp_path, text)
    with pytest.raises(GoldenFormatError, match="golden") as caught:
        load_record(tmp_path, "one")
    assert caught.value.code == "HN302"
    (tmp_path / "index.json").write_text(text, "utf-8")
    with pytest.raises(GoldenFormatError, match="golden"):
        load_index(tmp_path)


def test_an_index_of_something_else_is_refused(tmp_path: Path) -> None:
    """The right version and the wrong insides."""
    (tmp_path / "index.json").write_text('{"version": 1, "entries": {"a": 1}, "recordings": []}')
    with pytest.raises(GoldenFormatError, match="not an index"):
        load_index(tmp_path)


def test_a_record_that_cannot_be_put_in_place_leaves_nothing(tmp_path: Path) -> None:
    """Neither half a file nor a temporary one."""
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="taken"):
        write_atomically(tmp_path / "taken", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_the_recorded_files_are_small_and_the_index_says_what_made_them() -> None:
    """Below 500 kB each, with a reason, a date and versions; all that DESIGN asks for."""
    root = locations.golden_dir()
    index = load_index(root)
    for name, entry in index.entries.items():
        path = root / entry["file"]
        assert path.stat().st_size < 500_000, name
        assert entry["sha256"] == sha256_of(path), name
        made = index.recordings[entry["recording"] - 1]
        assert made["reason"]
        assert made["date"]
        assert made["made_with"]["versions"]["numpy"]
    files = {path.relative_to(root).as_posix() for path in root.rglob("*.json")}
    assert files == {"index.json"} | {entry["file"] for entry in index.entries.values()}


def test_numbers_that_json_lacks_are_not_recorded() -> None:
    """A NaN on record would be a golden that nothing meets."""
    with pytest.raises(ValueError, match="JSON"):
        record_text({}, {"logits": [[float("nan")]]})


def test_a_record_is_json_for_everybody() -> None:
    """Whatever its line breaks."""
    assert json.loads(record_text({}, FIELDS)) == {"version": 1, **FIELDS}
