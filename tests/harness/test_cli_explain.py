"""`explain` knows every code, and each explanation says how to mend it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bridge.cli import app
from bridge.errors import TensorParallelError, UsageError
from harness.cli_explain import error_kinds, explanation

ROOT = Path(__file__).parents[2]
CODES = sorted(
    code
    for package in ("bridge", "harness")
    for code in re.findall(r'code = "(\w+)"', (ROOT / package / "errors.py").read_text())
)


def test_every_code_is_there_and_stands_for_one_error() -> None:
    """The codes as they are written in the two files, none twice."""
    assert list(error_kinds()) == CODES
    assert len(set(CODES)) == len(CODES)


@pytest.mark.parametrize("code", [code for code in CODES if code != "HN000"])
def test_every_explanation_says_how_to_mend_it(code: str) -> None:
    """A reader who looks a code up learns more than the message has told."""
    text = explanation(error_kinds()[code])
    assert "To mend it: " in text
    assert "Args:" not in text


def test_a_code_is_explained_in_any_case() -> None:
    """As one types it."""
    done = CliRunner().invoke(app, ["explain", "br201"])
    assert done.exit_code == 0
    assert done.stdout.startswith(f"BR201 {explanation(TensorParallelError)}")
    assert done.stdout.endswith("The command exits with 2.\n")


def test_all_are_listed_as_json() -> None:
    """One entry per code, with the exit code a script meets."""
    done = CliRunner().invoke(app, ["explain", "--json"])
    entries = json.loads(done.stdout)
    assert [entry["code"] for entry in entries] == CODES
    assert {entry["code"]: entry["exit_code"] for entry in entries}["BR305"] == 1


def test_an_unknown_code_is_refused() -> None:
    """It names the code."""
    done = CliRunner().invoke(app, ["explain", "BR999"])
    assert isinstance(done.exception, UsageError)
    assert "BR999" in str(done.exception)
