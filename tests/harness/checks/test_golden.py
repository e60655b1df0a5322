"""The golden check on models that are on record, and on models that are not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.bench import Bench, Subject
from harness.checks import golden
from harness.suite import Case, parse_suite
from harness.toys import toy_named, write_checkpoint


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Healthy."""
    with Bench(tmp_path / "bench") as found:
        found.workdir.mkdir()
        yield found


@pytest.mark.parametrize(
    ("model", "dtype"), [("puzzle", "bfloat16"), ("golden-all-no-op", "float32")]
)
def test_a_model_on_record_is_held_to_it(model: str, dtype: str, bench: Bench) -> None:
    """Hundreds of values of each."""
    found = golden.run(Case(check="golden", model=model, dtype=dtype), bench)
    assert found.passed, found.places


def test_a_users_checkpoint_has_nothing_on_record(tmp_path: Path) -> None:
    """Not even one that is called like a toy and is one; comparing nothing is a failure."""
    write_checkpoint(toy_named("puzzle"), tmp_path / "hf")
    (tmp_path / "bench").mkdir()
    subject = Subject(name="puzzle", hf=tmp_path / "hf")
    with Bench(tmp_path / "bench", subjects={"puzzle": subject}) as bench:
        found = golden.run(Case(check="golden", model="puzzle", dtype="float32"), bench)
    assert not found.passed
    assert found.places == ("nothing is on record of puzzle in float32",)


def test_another_dtype_than_the_recorded_one_is_said(bench: Bench) -> None:
    """A golden model is recorded in its own dtype only."""
    case = Case(check="golden", model="golden-all-no-op", dtype="bfloat16")
    found = golden.run(case, bench)
    assert found.places == (
        "nothing is on record of golden-all-no-op in bfloat16, only in float32",
    )


def test_a_suite_names_golden_models() -> None:
    """As `golden:NAME`; an unknown one is refused with the suite."""
    document = {
        "schema_version": 1,
        "run": [{"checks": ["golden"], "models": ["golden:all-no-op"], "dtypes": ["float32"]}],
    }
    (case,) = parse_suite(document, name="s", where="s.toml").cases
    assert case.id == "golden/golden-all-no-op/float32"
