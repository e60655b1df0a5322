"""The README tells the truth: its commands run, its Python runs, its tree and its links exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text under one heading."""
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    """Fenced code of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def shell(script: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a block as a user would, with our command first on the path."""
    commands = directory / "bin"
    commands.mkdir(exist_ok=True)
    command = commands / "nemotron-bridge"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m harness "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(  # noqa: S603 (the README's commands)
        ["bash", "-euo", "pipefail", "-c", script],  # noqa: S607 (the user's own bash)
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.ranks
def test_the_example_runs_as_written_and_its_directories_are_equal(tmp_path: Path) -> None:
    """Every command of the example, then the Python of the next section, in one directory."""
    (example,) = blocks(section("Example"), "bash")
    done = shell(example, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "verified bit by bit" in done.stdout
    assert "0 failed" in done.stdout
    for quoted in blocks(section("Example"), "text")[0].splitlines():
        assert quoted in done.stdout
    for code in blocks(section("In Python"), "python"):
        script = tmp_path / "example.py"
        script.write_text(code)
        ran = shell(f"{sys.executable} example.py", tmp_path)
        assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "back-from-python" / "config.json").exists()


def test_the_error_shown_is_the_error_printed(tmp_path: Path) -> None:
    """The sample diagnostic is what the command says."""
    sample = blocks(section("Commands"), "text")[0]
    config = ROOT / "suites" / "variants" / "Llama-3_3-Nemotron-Super-49B-v1.json"
    done = shell(f"nemotron-bridge inspect {config} --tp 3", tmp_path)
    assert done.returncode == 2
    first, place, *_, last = done.stderr.splitlines()
    assert [first, place] == sample.splitlines()[:2]
    assert last == sample.splitlines()[2]


def test_every_command_is_in_the_table_and_exists() -> None:
    """The table and the program name the same commands."""
    from typer.main import get_command

    import harness.cli

    listed = set(re.findall(r"^\| `([a-z]+)", section("Commands"), flags=re.MULTILINE))
    assert set(get_command(harness.cli.app).commands) == listed  # type: ignore[attr-defined]  # a group


def test_as_many_faults_are_killed_as_there_are() -> None:
    """The catalogue grows, and the table of what was run with it."""
    from harness.faults import CATALOGUE

    (killed, known) = re.findall(r"(\d+) of (\d+) faults killed", README)[0]
    assert int(killed) == int(known) == len(CATALOGUE)


def test_the_tree_names_what_is_there() -> None:
    """Each path in the tree exists."""
    folder = ROOT
    for line in blocks(section("What is where"), "text")[0].splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        if indent == 0:
            folder = ROOT / name
            assert folder.exists(), line
            continue
        for one in re.findall(r"[a-z_]+\.py|[a-z_]+/", line[:40]):
            assert (folder / one).exists(), line


def test_the_set_up_commands_are_the_ones_ci_runs() -> None:
    """CI follows the README, so that the README cannot rot."""
    commands = blocks(section("Set-up"), "bash")[0]
    ci = (ROOT / ".ci" / "run").read_text()
    for session in re.findall(r"nox -s (\w+)", commands):
        assert f".venv/bin/nox -s {session}" in ci
