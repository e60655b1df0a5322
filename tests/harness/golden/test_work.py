"""Checking and recording a folder of goldens: stale, missing and unused entries fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import locations
from harness.bench import Bench
from harness.errors import GoldenRecordError, SuiteError
from harness.golden import work
from harness.golden.cases import golden_models
from harness.golden.observe import entry_name
from harness.golden.store import Index, index_text, load_index, sha256_of
from harness.hooks import Fault
from harness.suite import Case
from harness.toys import TOYS

NAMES = ("all-no-op", "all-linear")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One for all tests: the models do not change."""
    with Bench(tmp_path_factory.mktemp("work")) as found:
        yield found


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: Bench) -> Path:
    """A folder in which two small models are on record, and a set of just these two."""
    every = work.entries()
    monkeypatch.setattr(work, "entries", lambda: {name: every[name] for name in NAMES})
    monkeypatch.setattr(locations, "golden_dir", lambda: tmp_path)
    monkeypatch.delenv("CI", raising=False)
    work.record(tmp_path, bench, reason="for the test")
    return tmp_path


def problems(root: Path, bench: Bench) -> dict[str, str]:
    """What is wrong, by entry."""
    return {one.name: "; ".join(one.problems) for one in work.check(root, bench) if one.problems}


def test_what_was_recorded_holds(root: Path, bench: Bench) -> None:
    """Both models, in a folder that holds nothing else."""
    assert [one.name for one in work.check(root, bench)] == list(NAMES)
    assert problems(root, bench) == {}


def test_the_set_is_the_covering_set_the_toys_and_the_published_plans() -> None:
    """Nothing else is on record, and nothing less."""
    toys = {entry_name(toy, dtype) for toy in TOYS for dtype in ("float32", "bfloat16")}
    assert work.entries().keys() == {*golden_models(), *toys, "plans"}
    assert load_index(locations.golden_dir()).entries.keys() == work.entries().keys()


def test_a_missing_record_fails(root: Path, bench: Bench) -> None:
    """A model that nothing is on record of is not checked by anything."""
    (root / "cases" / "all-linear.json").unlink()
    assert problems(root, bench) == {"all-linear": "cases/all-linear.json: missing"}


def test_a_missing_index_entry_fails(root: Path, bench: Bench) -> None:
    """A file that nobody answers for."""
    index = load_index(root)
    del index.entries["all-linear"]
    (root / "index.json").write_text(index_text(index), "utf-8")
    assert problems(root, bench) == {"all-linear": "index.json: all-linear is not in it"}


def test_unused_files_and_entries_fail(root: Path, bench: Bench) -> None:
    """What is left over from models that are gone."""
    (root / "cases" / "gone.json").write_text("{}")
    index = load_index(root)
    index.entries["ghost"] = {"file": "cases/ghost.json", "sha256": "", "recording": 7}
    (root / "index.json").write_text(index_text(index), "utf-8")
    found = problems(root, bench)
    assert found.keys() == {"cases/gone.json", "ghost"}
    assert "nothing uses it" in found["cases/gone.json"]


def test_a_stale_record_fails_and_says_where(root: Path, bench: Bench) -> None:
    """As if the bridge had changed since: the file is another, and the index answers for it."""
    path = root / "cases" / "all-linear.json"
    path.write_text(path.read_text("utf-8").replace("mlp.linear_mlp", "mlp.linear_mip"), "utf-8")
    index = load_index(root)
    index.entries["all-linear"]["sha256"] = sha256_of(path)
    (root / "index.json").write_text(index_text(index), "utf-8")
    found = problems(root, bench)
    assert found.keys() == {"all-linear"}
    assert "plan[5]: decoder.layers.0.mlp.weight" in found["all-linear"]
    assert "hf_tensors" in found["all-linear"]


def test_an_edited_record_fails(root: Path, bench: Bench) -> None:
    """Without the index, which nobody edits along."""
    path = root / "cases" / "all-linear.json"
    path.write_text(path.read_text("utf-8") + " ", "utf-8")
    assert "is not what was recorded" in problems(root, bench)["all-linear"]


def test_recording_keeps_what_has_not_changed_and_why_it_was_recorded(
    root: Path, bench: Bench
) -> None:
    """Only what changes gets the new reason, the old one stays on record, strays are removed."""
    before = load_index(root)
    found = work.record(root, bench, reason="nothing changed")
    assert found.written == ()
    assert load_index(root) == before
    (root / "cases" / "all-linear.json").unlink()
    (root / "cases" / "gone.json").write_text("{}")
    found = work.record(root, bench, reason="second")
    assert (found.written, found.unchanged) == (("all-linear",), ("all-no-op",))
    assert found.removed == ("gone",)
    after = load_index(root)
    assert [one["reason"] for one in after.recordings] == ["for the test", "second"]
    assert after.entries["all-no-op"] == before.entries["all-no-op"]
    assert after.entries["all-linear"]["recording"] == 2
    assert problems(root, bench) == {}


def test_a_selection_leaves_the_rest_alone(root: Path, bench: Bench) -> None:
    """Checked or recorded: the others are neither looked at nor removed."""
    (root / "cases" / "gone.json").write_text("{}")
    (root / "cases" / "all-linear.json").unlink()
    assert [one.passed for one in work.check(root, bench, ["*no-op"])] == [True]
    assert work.record(root, bench, reason="one", patterns=["no-op"]).removed == ()
    assert not (root / "cases" / "all-linear.json").exists()
    with pytest.raises(SuiteError, match="none of 2 goldens"):
        work.check(root, bench, ["nothing"])


@pytest.mark.parametrize("reason", ["", "  \n"])
def test_recording_needs_a_reason(reason: str, root: Path, bench: Bench) -> None:
    """Nothing is written."""
    before = (root / "index.json").read_bytes()
    with pytest.raises(GoldenRecordError, match="for a reason"):
        work.record(root, bench, reason=reason)
    assert (root / "index.json").read_bytes() == before


def test_ci_and_a_faulty_bridge_record_nothing(
    root: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HN301: they would agree with whatever is wrong."""
    with pytest.raises(GoldenRecordError, match="fault"):
        work.record(root, bench.under(Fault(name="any")), reason="because")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(GoldenRecordError, match="not recorded in CI") as caught:
        work.record(root, bench, reason="because")
    assert caught.value.code == "HN301"


def test_an_index_entry_names_a_recording_that_there_is(root: Path, bench: Bench) -> None:
    """Or nobody could say what made it."""
    index = load_index(root)
    stripped = Index(recordings=[], entries=index.entries)
    (root / "index.json").write_text(index_text(stripped), "utf-8")
    assert "names recording 1, there is none" in problems(root, bench)["all-linear"]


def test_the_published_plans_are_those_on_record() -> None:
    """The one entry that no model is built for."""
    recorded = json.loads((locations.golden_dir() / "plans.json").read_text("utf-8"))
    assert work.published_plans() == recorded


def test_toys_and_golden_models_cannot_share_a_name() -> None:
    """An entry is of one case: its name says which."""
    case = Case(check="golden", model="golden-all-linear", dtype="bfloat16")
    assert work.entries()["all-linear"] == case
    assert not any(name.startswith("toy-") for name in golden_models())
