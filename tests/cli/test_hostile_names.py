"""Names with escapes, markup, HTML and newlines in them: shown everywhere, obeyed nowhere."""

from __future__ import annotations

import io
import json
import logging
import struct
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Final

import pytest

from bridge.console import stdout, table
from bridge.drawing import architecture, figure, svg
from bridge.errors import BridgeError
from bridge.hf_config import load_hf_config
from bridge.visible import visible, visible_prose
from harness.errors import WorkerFailedError
from harness.report.card import to_yaml
from harness.report.html import html
from harness.report.junit import junit
from harness.report.markdown import markdown, plain
from harness.toys import toy_named, write_checkpoint
from tests.cli.conftest import Run

HOSTILE: Final = (
    "\x1b]0;owned\x07\x1b[2J\x9b31m\r\nBR000 forged\n  --> /etc\u202egnp.exe\u2028\x00\ud800"
    "[red]x[/red][link=https://e.x]y[/link]:skull:<script>alert(1)</script>&\"'|`*_#"
)
NEVER: Final = ("\x1b", "\x07", "\x9b", "\r", "\u202e", "\u2028", "\x00", "\ud800")


def check_shown(text: str) -> None:
    """Nothing that a terminal obeys, and no line that the name began."""
    assert not [repr(one) for one in NEVER if one in text]
    assert not [
        line for line in text.splitlines() if line.startswith(("BR000 forged", "  --> /etc"))
    ]
    assert "\\x1b]0;owned" in text


def test_an_error_shows_a_hostile_name_in_its_lines() -> None:
    """In message, place and hint alike: as many lines as there are parts."""
    text = str(BridgeError(f"bad {HOSTILE}", where=[HOSTILE, "here"], hint=HOSTILE))
    check_shown(text)
    assert len(text.splitlines()) == 4
    assert len(str(BridgeError("x" * 10_000_000))) < 3000


def test_the_traceback_of_a_rank_keeps_its_lines_and_nothing_else() -> None:
    """Exceptions of libraries have names in them, too."""
    error = WorkerFailedError("it broke", rank=1, rank_traceback=f"a\n\tb {NEVER[0]}[2J")
    assert "a\n\tb \\x1b[2J" in str(error)


@pytest.mark.parametrize("name", [HOSTILE, "[bold]x[/bold]", ":smile:"])
def test_tables_and_lines_show_names_and_no_colours_of_theirs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the console is a terminal, whose own colours stay."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    console = stdout()
    console.file = io.StringIO()
    console._force_terminal = True
    rows = table("name")
    rows.add_row(name)
    console.print(rows)
    console.print(f"note: {visible(name)}")
    text = console.file.getvalue()
    assert ("[red]x[/red]" if name == HOSTILE else name) in text
    for one in ("\x1b]0", "\x1b[2J", "\x1b[31m", *NEVER[1:]):
        assert one not in text


def test_the_commands_show_hostile_tensor_names(tmp_path: Path, run: Run) -> None:
    """Of a header: in the errors of `inspect`'s neighbours, which list what they did not expect."""
    write_checkpoint(toy_named("super-49b-v1"), tmp_path / "hf")
    path = next((tmp_path / "hf").glob("*.safetensors"))
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    name = HOSTILE.replace("\ud800", "")
    header[name] = header.pop(next(one for one in header if one != "__metadata__"))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    for path in (tmp_path / "hf").glob("*.index.json"):
        path.unlink()
    if not (tmp_path / "hf" / "model.safetensors").exists():
        path = next((tmp_path / "hf").glob("*.safetensors"))
    for command in (
        ("plan", tmp_path / "hf"),
        ("import", "--hf-model", tmp_path / "hf", "--megatron-path", tmp_path / "m"),
        ("verify", "--hf-model", tmp_path / "hf", "--checks", "config"),
    ):
        outcome = run(*command)
        assert outcome.code == 2, outcome
        assert not [one for one in NEVER if one in outcome.err + outcome.out]


def test_a_side_file_of_a_hostile_name_is_carried_under_it_and_shown_otherwise(
    tmp_path: Path, run: Run
) -> None:
    """What stays behind is told in a note, one line for each."""
    write_checkpoint(toy_named("super-49b-v1"), tmp_path / "hf")
    (tmp_path / "hf" / "\x1b[2J\nnote: all is well.bin").write_bytes(b"")
    outcome = run("import", "--hf-model", tmp_path / "hf", "--megatron-path", tmp_path / "m")
    assert outcome.code == 0, outcome
    assert "\\x1b[2J\\nnote: all is well.bin" in outcome.out
    assert "\x1b" not in outcome.out


def test_log_lines_are_shown(caplog: pytest.LogCaptureFixture) -> None:
    """The formatter that the entry point installs."""
    from harness.cli import _Formatter

    record = logging.LogRecord("a", logging.WARNING, "", 0, "%s", ("\x1b[2J\u202e",), None)
    assert _Formatter("%(message)s").format(record) == "\\x1b[2J\\u202e"
    assert not caplog.messages


def test_what_a_model_writes_keeps_its_lines_and_loses_its_controls() -> None:
    """Joiners belong to words of some languages; escape sequences to none."""
    assert visible_prose("a\n\tb \u200d \x1b[2J\x9b") == "a\n\tb \u200d \\x1b[2J\\x9b"


# Reports


@pytest.fixture
def evidence() -> dict[str, Any]:
    """A run in which every name is hostile, made from one of the repository's."""
    path = Path(__file__).parents[2] / "docs/evidence/super-49b-tp1/evidence.json"
    data: dict[str, Any] = json.loads(path.read_text("utf-8"))
    name = HOSTILE.replace("\ud800", "")
    case = data["cases"][0]
    case |= {"model": name, "id": name, "summary": name, "status": "failed", "places": [name]}
    data["command"] = ["nemotron-bridge", name]
    data["inputs"] = {name: next(iter(data["inputs"].values()))}
    data["suite"] = name
    return data


def test_junit_is_xml_whatever_the_names_are(evidence: dict[str, Any]) -> None:
    """A strict parser reads it, and finds the name's letters as text."""
    root = ET.fromstring(junit(evidence))  # noqa: S314 - our own
    failure = next(root.iter("failure"))
    assert "<script>alert(1)</script>" in str(failure.text)
    assert not list(root.iter("script"))


def test_html_has_no_element_of_a_names_making(evidence: dict[str, Any]) -> None:
    """A parser of HTML meets no script, link or image that the page itself does not have."""
    found: list[str] = []

    class Elements(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.append(tag)
            found.extend(name for name, _ in attrs if name.startswith("on"))

    page = html(evidence)
    Elements().feed(page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert not {"script", "img", "iframe", "onload", "onerror", "onclick"} & set(found)


def test_markdown_has_nothing_of_a_names_making(evidence: dict[str, Any]) -> None:
    """Each special character is escaped, and a line begins with what we wrote."""
    text = markdown(evidence)
    assert "\\<script\\>" in text
    assert not [one for one in NEVER if one in text]
    assert plain("a|b\n# c") == "a\\|b \\# c"


def test_a_cards_strings_are_quoted() -> None:
    """YAML's own reader gives back just the name, under just the key."""
    import yaml

    name = HOSTILE.replace("\ud800", "")
    assert yaml.safe_load(to_yaml({"a": {"b": name}, "c": "x: y\n- z"})) == {
        "a": {"b": name}, "c": "x: y\n- z",
    }  # fmt: skip


def test_a_drawing_is_xml_whatever_the_model_is_called(tmp_path: Path) -> None:
    """Title and labels: letters, not elements."""
    from bridge.hf_config import spec_from_hf_config

    write_checkpoint(toy_named("super-49b-v1"), tmp_path / "hf")
    spec = spec_from_hf_config(load_hf_config(tmp_path / "hf"))
    name = HOSTILE.replace("\ud800", "")
    drawn = svg.svg(figure.figure(architecture.architecture(spec, None, name=name)))
    root = ET.fromstring(drawn)  # noqa: S314 - our own
    assert not [one.tag for one in root.iter() if one.tag.endswith(("script", "a", "image"))]
    assert "<script>" in root.attrib["aria-label"]
