"""Every command that a page shows exists, with its options: parsed as it is when run, but not run.

`test_pages.py` and `tests/test_readme.py` run what a toy is enough for. The rest wants a real
checkpoint, a GPU or a cluster, and would rot unread.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nox
import pytest
from typer.main import get_command

import harness.cli  # noqa: F401 - it adds the commands
from bridge.cli import app

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "golden/README.md", "suites/README.md")),
        ROOT / ".github" / "CONTRIBUTING.md",
        *(page for page in (ROOT / "docs").rglob("*.md") if "evidence" not in page.parts),
    ]
)


def sessions() -> dict[str, Any]:
    """What `nox -l` lists."""
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return dict(nox.registry.get())


SESSIONS = sessions()
PROGRAM: Any = get_command(app)  # a group of typer's own click, which has no types


def lines(text: str) -> Iterator[str]:
    """The lines of fenced blocks, output left out, continued ones joined."""
    fences = r"^( *)```([^\n]*)\n(.*?)^\1```"
    for _, language, block in re.findall(fences, text, flags=re.MULTILINE | re.DOTALL):
        if language != "text":
            yield from block.replace("\\\n", " ").splitlines()


def split(line: str) -> list[list[str]]:
    """The commands of a line of shell, as words."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("();<>|&"):
            found.append([])
        elif not re.fullmatch(r"\$\{\w+\[@\]\}", word):  # words that the shell makes up
            found[-1].append(word)
    return found


def ours(words: Sequence[str]) -> list[str]:
    """What our program is given by a command; nothing where it is another's."""
    for index, word in enumerate(words):
        name = word.rpartition("/")[2]
        if name == "nemotron-bridge" or list(words[index - 1 : index + 1]) == ["-m", "harness"]:
            return list(words[index + 1 :])
        if name == "nox" and "--" in words:
            return [*handed_on(words[words.index("-s") + 1]), *words[words.index("--") + 1 :]]
    return []


def handed_on(session: str) -> list[str]:
    """The command of ours that a session passes its arguments to."""
    code = inspect.getsource(SESSIONS[session].func)
    found = re.search(r'"harness", ([^)]*)\*session\.posargs', code)
    return re.findall(r'"([^"]+)"', found[1]) if found else []


COMMANDS = sorted(
    {
        (page.relative_to(ROOT).as_posix(), *given)
        for page in PAGES
        for line in lines(page.read_text(encoding="utf-8"))
        if re.search(r"nemotron-bridge|-m harness\b|nox\b", line)
        for given in map(ours, split(line))
        if given
    }
)


def parse(arguments: Sequence[str]) -> None:
    """As the program does before it runs a command."""
    command, rest = PROGRAM, list(arguments)
    while hasattr(command, "commands"):
        assert rest[0] in command.commands, rest
        command = command.commands[rest.pop(0)]
    command.make_context(command.name, rest)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_of_a_page_parses(command: tuple[str, ...]) -> None:
    """Each command, option and choice exists, and none that is required is left out."""
    parse(command[1:])


def test_no_command_is_looked_past() -> None:
    """The pages that show commands, each with as many as can be seen by eye."""
    shown = [name for name, *_ in COMMANDS]
    assert {name for name in shown if not name.startswith("docs/")} == {
        "README.md",
        "suites/README.md",
    }
    assert shown.count("docs/generation.md") == 9
    assert shown.count("docs/clusters.md") == 4
    assert ("README.md", "faults", "--device", "cuda", "--dtypes", "float32,bfloat16") in COMMANDS


def test_a_misspelt_option_and_a_missing_one_fail() -> None:
    """Or the tests above prove nothing."""
    parse(["import", "--hf-model", "M", "--megatron-path", "P"])
    with pytest.raises(Exception, match="--hf-modle"):
        parse(["import", "--hf-modle", "M", "--megatron-path", "P"])
    with pytest.raises(Exception, match="megatron_path"):
        parse(["import", "--hf-model", "M"])
    with pytest.raises(AssertionError, match="imprt"):
        parse(["imprt", "--hf-model", "M", "--megatron-path", "P"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_session_of_a_page_exists(page: Path) -> None:
    """In a block or in a sentence."""
    named = re.findall(r"\bnox -s (\w+(?: \w+)*)", page.read_text(encoding="utf-8"))
    assert set(" ".join(named).split()) <= set(SESSIONS)
