"""The page on clusters tells the truth: its commands parse, its suite loads, its files are ours."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer.main
from click import Command

import harness.cli  # noqa: F401 - it adds the commands
from bridge.cli import app
from bridge.crew import bounds
from harness.suite import load_suite, parse_suite

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Fenced code of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """The words of every one of our commands on the page, from its name on."""
    found = []
    for block in [*blocks("sh"), *blocks("bash")]:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "nemotron-bridge" in words:
                found.append(words[words.index("nemotron-bridge") + 1 :])
    for block in blocks("yaml"):
        arguments = re.findall(r"^ +- (\S+)$", block, flags=re.MULTILINE)
        found.append(arguments[arguments.index("nemotron-bridge") + 1 :])
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_option_of_a_command_exists(words: list[str]) -> None:
    """Parsed as the program parses it, but not run."""
    group = typer.main.get_command(app)
    command: Command = group.commands[words[0]]  # type: ignore[attr-defined]  # a group
    arguments = [word for word in words[1:] if not word.startswith("$")]  # the shell's own
    command.make_context(words[0], arguments)
    if words[0] == "parity" and "cluster.toml" not in words:
        suite = re.search(r"--suite[= ](\S+)", " ".join(words))
        assert suite is not None
        load_suite(suite[1])


def test_there_are_as_many_commands_as_the_page_shows() -> None:
    """Or the test above looks past some of them."""
    assert len(commands()) == 5
    assert {words[0] for words in commands()} == {"parity", "verify"}


def test_the_suite_loads() -> None:
    """And has the cases of layouts that one machine cannot hold."""
    (text,) = blocks("toml")
    suite = parse_suite(tomllib.loads(text), name="cluster", where="docs/clusters.md")
    assert "logits/ultra-253b/tp4-pp4/bfloat16/long/cuda/te-unfused" in {
        case.id for case in suite.cases
    }


def test_the_batch_script_is_bash() -> None:
    """Read, not run."""
    (script,) = blocks("bash")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=20)  # noqa: S607 - the user's own


def test_the_bounds_are_the_programs_own() -> None:
    """The numbers of the table, row by row."""
    (rows,) = re.findall(r"the run ends after .*?\n\n", PAGE, flags=re.DOTALL)
    found = [int(number) for number in re.findall(r"(\d+) s\b[^|]*\|[^|]*\|\n", rows)]
    assert found == [
        bounds.DEATH, bounds.FROZEN, bounds.HUNG, bounds.JOIN, bounds.DEATH, bounds.LEAVE,
    ]  # fmt: skip


def test_errors_and_reasons_are_the_programs_own() -> None:
    """What the page quotes is said somewhere in the code."""
    code = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "harness").rglob("*.py")))
    for quoted in (
        "ranks do not see the files that rank 0 does",
        "ranks run other software than rank 0",
        "the processes of torchrun do not come together",
        "HN202 torchrun ends this run",
        "ranks_per_host",
        "journal.jsonl",
    ):
        assert quoted in PAGE
        assert quoted in code
