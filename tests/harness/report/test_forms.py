"""JUnit, Markdown and HTML say what the evidence says, as text, whatever is in it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bridge.drawing.architecture import architecture
from bridge.errors import UsageError
from bridge.hf_config import spec_from_hf_config
from bridge.storage.target import MANIFEST_NAME
from harness.report.charts import Series, bars, lines
from harness.report.evidence import read_evidence
from harness.report.files import REPORTS, report_directory
from harness.report.html import html, render_kill_matrix
from harness.report.junit import junit
from harness.report.markdown import markdown
from harness.report.write import write_reports
from harness.runner import Result
from harness.toys import TOYS
from tests.harness.report.conftest import HOSTILE, POSITIONS

ROOT = Path(__file__).parents[3]
Make = Callable[..., dict[str, Any]]
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember it."""
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """`<line/>` of SVG."""
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        """Close the last one."""
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Collect it."""
        self.text += data


def test_junit_tells_failures_errors_and_what_was_not_run_apart(make_evidence: Make) -> None:
    """Counts agree with elements, and terminal escapes do not break the XML."""
    root = ET.fromstring(junit(make_evidence()))  # noqa: S314 - our own
    suite = root.find("testsuite")
    assert suite is not None
    counts = {"tests": "testcase", "failures": "failure", "errors": "error", "skipped": "skipped"}
    for attribute, tag in counts.items():
        assert int(suite.attrib[attribute]) == len(list(suite.iter(tag)))
    assert {name: suite.attrib[name] for name in counts} == {
        "tests": "8", "failures": "2", "errors": "1", "skipped": "1",
    }  # fmt: skip
    (skipped,) = suite.iter("skipped")
    assert skipped.attrib["message"] == "gpu"
    (error,) = suite.iter("error")
    assert HOSTILE in (error.text or "")
    assert error.attrib["type"] == "ValueError"


def test_markdown_begins_with_the_verdict_and_no_text_of_ours_becomes_markup(
    make_evidence: Make, kill_matrix: dict[str, Any]
) -> None:
    """Tables keep their columns; names stay names."""
    text = markdown(make_evidence(), kill_matrix=kill_matrix)
    assert text.startswith("# FAILED: 4 passed, 2 failed, 1 error, 1 not run (gpu)\n")
    assert "| puzzle | 0/1 ERROR | 1/2 FAILED | - |" in text
    assert "| tied | 0.97 | 37.5 |" in text
    assert "3 faults, 1 survivors: no-scaling" in text
    outside_code = re.sub(r"`[^`\n]*`", "", text)
    assert not re.search(r"(?<!\\)<script", outside_code)
    for table in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(columns) == 1


def test_a_limit_says_up_to_which_width_of_a_model_it_holds(make_evidence: Make) -> None:
    """And one that holds at any width says nothing of it, as evidence of old does."""
    data, common = make_evidence(), {"measured": {"worst": 1}, "command": "it", "floor_ulp": 0.0}
    data["thresholds"] = [
        {"name": "wide", "dtype": "float32", "limit": 3.5, "unit": "ulp", **common, **width}
        for width in ({"hidden_size": 1024}, {"hidden_size": None}, {})
    ]
    limits = markdown(data).partition("## Limits\n\n")[2].splitlines()[2:5]
    with_width, *others = limits
    assert with_width == r"| wide | float32 | 3.5 | ulp up to hidden\_size 1024 |"
    assert others == ["| wide | float32 | 3.5 | ulp |"] * 2
    page = html(data)
    assert page.count("<td>ulp up to hidden_size 1024</td>") == 1
    assert page.count("<td>ulp</td>") == 2


def test_the_page_is_self_contained_and_well_formed(
    make_evidence: Make, kill_matrix: dict[str, Any]
) -> None:
    """No script, nothing fetched, and what looks like markup is shown."""
    text = html(make_evidence(), kill_matrix=kill_matrix)
    page = Page(text)
    assert {"script", "link", "img", "iframe"}.isdisjoint(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name[:2] == "on"]
    assert not re.search(r"url\(|@import|https?:", text)
    assert HOSTILE in page.text
    assert page.tags.count("svg") == 1 + 2 * 4  # blocks of one model, logits of two


def test_the_page_says_the_verdict_before_anything_else(make_evidence: Make) -> None:
    """Then every failure with its place."""
    visible = Page(
        "<body>" + html(make_evidence()).partition("<body>")[2].partition("</html>")[0]
    ).text
    assert visible.split()[0] == "Failed"
    assert visible.index("What failed") < visible.index("Models and checks")
    assert "token 4" in visible
    assert "37.5" in visible


def test_the_pictures_are_of_the_worst_case_of_each_model(make_evidence: Make) -> None:
    """Not of the first, and a value that could not be measured is the worst."""
    page = html(make_evidence())
    captions = re.findall(r'<h3>(logits/\S+) <span class="(\w+)-text', page)
    assert captions == [
        ("logits/tied/tp2-pp1/float32/long", "failed"),
        ("logits/puzzle/tp2-pp1/float32/long", "failed"),
    ]
    assert all(f">{position}</text>" in page for position in POSITIONS)


def test_the_page_draws_each_model_once(make_evidence: Make) -> None:
    """Whatever its dtypes, and whatever its name; the page's rules for its own figures stay out."""
    one = {
        "config_sha256": "0" * 64,
        "weight_files": {},
        "architecture": architecture(
            spec_from_hf_config(TOYS["puzzle"].config), None, name=""
        ).as_data(),
    }
    inputs = {f"{name}/{dtype}": one for name in ("puzzle", HOSTILE) for dtype in ("f32", "bf16")}
    inputs["unknown/f32"] = {"config_sha256": "0" * 64, "weight_files": {}}
    data = make_evidence(inputs=inputs)
    text = html(data)
    page = Page(text)
    assert page.attributes.count(("class", "architecture")) == 2
    assert page.text.count("layer 4: attention one matrix; feed-forward width ") == 2 * 2
    assert not re.search(r"url\(|@import|https?:", text)
    assert ">puzzle</text>" in text
    assert HOSTILE.partition("/")[0] not in re.sub(r"&[a-z]+;", "", text.partition("<body>")[2])
    assert not re.search(r"^svg text", text, flags=re.MULTILINE)
    alone = Page(html(make_evidence(inputs={"puzzle": one})))
    assert ("open", "") in alone.attributes


def test_a_run_of_one_case_without_pictures_is_a_page(
    make_evidence: Make, run_results: list[Result]
) -> None:
    """Sections that have nothing to show are not there."""
    page = Page(html(make_evidence(run_results[:1], memory={}, suite=None)))
    assert "svg" not in page.tags
    assert "Kill matrix" not in page.text
    assert "Passed" in page.text


def test_the_kill_matrix_shows_survivors_and_idle_checks(kill_matrix: dict[str, Any]) -> None:
    """One square for each check that saw a fault."""
    text = render_kill_matrix(kill_matrix)
    page = Page(text)
    assert text.count('aria-label="killed"') == 3
    assert text.count('<tr class="survivor">') == 1
    assert "1 survived: no-scaling" in page.text
    assert "Checks that saw none: golden" in page.text
    assert HOSTILE in page.text


def test_all_reports_are_written_and_the_evidence_can_be_read_back(
    make_evidence: Make, tmp_path: Path
) -> None:
    """A failed run has its reports too."""
    data = make_evidence()
    write_reports(data, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "evidence.json", "junit.xml", "report.html", "report.md",
    ]  # fmt: skip
    assert read_evidence(tmp_path) == data


@pytest.mark.parametrize("values", [[], [None], [float("nan")], [0.0, -1.0], [float("inf")]])
def test_a_figure_without_a_value_to_draw_says_so(values: list[float | None]) -> None:
    """No error, and no empty axes that look like zeros."""
    series = [Series(name="x", style="s1", values=values)]
    assert "Nothing to draw" in lines(series, ["0"] * len(values), x="x", y="y")
    assert "Nothing to draw" in bars([("0", 0)], x="x", y="y")


def test_zero_everywhere_is_told_from_no_value() -> None:
    """Bit-equal logits are not missing ones."""
    for values, said in (([0.0, 0.0], "zero everywhere"), ([0.0, None], "no value")):
        series = [Series(name="x", style="s1", values=values)]
        assert said in lines(series, ["0", "1"], x="x", y="y")


def test_a_value_that_cannot_be_drawn_leaves_a_gap() -> None:
    """Two lines of two points each, not one through the hole."""
    values = [1.0, 2.0, float("nan"), 4.0, 8.0]
    drawn = lines([Series(name="x", style="s1", values=values)], list("abcde"), x="x", y="y")
    assert drawn.count("<polyline") == 2
    assert drawn.count("<circle") == 4


def test_larger_values_are_drawn_higher() -> None:
    """An axis that ran the other way would still look fine."""
    drawn = lines([Series(name="x", style="s1", values=[1.0, 10.0])], ["a", "b"], x="x", y="y")
    low, high = (float(y) for y in re.findall(r'<circle [^>]*cy="([\d.]+)"', drawn))
    assert high < low


def test_a_kill_matrix_in_the_directory_is_in_the_report(
    make_evidence: Make, kill_matrix: dict[str, Any], tmp_path: Path
) -> None:
    """Whoever ran `faults --report DIR` finds it there; a damaged one is left out."""
    write_reports(make_evidence(), tmp_path)
    assert "<h2>Kill matrix" not in (tmp_path / "report.html").read_text("utf-8")
    (tmp_path / "faults.json").write_text(json.dumps(kill_matrix), "utf-8")
    write_reports(make_evidence(), tmp_path)
    fault = kill_matrix["faults"][0]
    assert fault in (tmp_path / "report.html").read_text("utf-8")
    assert fault in (tmp_path / "report.md").read_text("utf-8")
    (tmp_path / "faults.json").write_text("{", "utf-8")
    write_reports(make_evidence(), tmp_path)
    assert fault not in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.parametrize("obstacle", ["evidence.json", "journal.jsonl"])
def test_a_directory_in_a_reports_place_is_refused_before_any_work(
    tmp_path: Path, obstacle: str
) -> None:
    """One error that names it, not a traceback after hours."""
    (tmp_path / obstacle).mkdir()
    with pytest.raises(UsageError, match="cannot write the report") as caught:
        report_directory(tmp_path)
    assert str(tmp_path / obstacle) in caught.value.where


def test_what_no_run_has_left_is_not_replaced(
    make_evidence: Make, kill_matrix: dict[str, Any], tmp_path: Path
) -> None:
    """A report of somebody's own is refused by name; what a run has left may be made anew."""
    notes = tmp_path / "theirs" / "report.md"
    notes.parent.mkdir()
    notes.write_text("my own")
    (notes.parent / "notes.md").write_text("no report has this name")
    with pytest.raises(UsageError, match="no run of nemotron-bridge has left") as caught:
        report_directory(notes.parent)
    assert caught.value.where == (str(notes),)
    for name in ("ours", "cut short", "faults"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.md").write_text("of an earlier run")
    write_reports(make_evidence(), tmp_path / "ours")
    (tmp_path / "cut short" / "journal.jsonl").write_text('{"journal": 1, "identity": {}}')
    (tmp_path / "faults" / "faults.json").write_text(json.dumps(kill_matrix), "utf-8")
    for name in ("ours", "cut short", "faults"):
        assert report_directory(tmp_path / name) == tmp_path / name
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "journal.jsonl").touch()  # of a run that was killed at once
    report_directory(tmp_path / "empty")


def test_every_file_that_reports_replace_is_known(make_evidence: Make, tmp_path: Path) -> None:
    """One that is not would be replaced unasked."""
    write_reports(make_evidence(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= REPORTS
    kept = {path.name for path in (ROOT / "docs" / "evidence").rglob("*") if path.is_file()}
    assert kept <= REPORTS
    sources = [*(ROOT / "harness").glob("cli_*.py"), *(ROOT / "harness/benchmarks").glob("*.py")]
    text = "".join(path.read_text("utf-8") for path in sources)
    said = set(re.findall(r'report / "([\w.-]+)"|file="([\w-]+\.svg)"', text))
    assert {name for pair in said for name in pair if name} <= REPORTS


def test_a_file_in_the_directorys_or_the_rank_logs_place_is_refused(tmp_path: Path) -> None:
    """Nothing can be made there."""
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write the report"):
        report_directory(tmp_path / "file")
    (tmp_path / "ranks").touch()
    with pytest.raises(UsageError, match="cannot write the report"):
        report_directory(tmp_path, rank_logs=True)


@pytest.mark.parametrize("name", [MANIFEST_NAME, "model-00001-of-00002.safetensors", ".metadata"])
def test_a_report_does_not_go_into_a_checkpoint(tmp_path: Path, name: str) -> None:
    """The next conversion would carry it along, and the manifest does not have it."""
    (tmp_path / name).touch()
    with pytest.raises(UsageError, match="into a checkpoint"):
        report_directory(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
