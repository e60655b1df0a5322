"""`inspect` as a user runs it: the strip, pictures, memory, layouts that fit."""

from __future__ import annotations

import json
import re
import shlex
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bridge.convert import read_spec
from bridge.megatron_args import layout_flags
from bridge.pipeline import parse_layout

if TYPE_CHECKING:
    from tests.cli.conftest import Run

VARIANTS = Path(__file__).parents[2] / "suites" / "variants"
SUPER = VARIANTS / "Llama-3_3-Nemotron-Super-49B-v1.json"
ULTRA = VARIANTS / "Llama-3_1-Nemotron-Ultra-253B-v1.json"
DOCS = VARIANTS.parents[1] / "docs"
NANO = VARIANTS / "Llama-3.1-Nemotron-Nano-8B-v1.json"


def test_the_strip_is_shown_without_escapes_where_no_terminal_is(run: Run) -> None:
    """Piped: no colour, and the blocks of the published configuration, no-ops included."""
    found = run("inspect", SUPER, "--pp", "2")
    assert found.code == 0
    assert "\x1b" not in found.out
    assert "attention 888888..888.8888888888888888888888888888\n" in found.out
    assert "attention 88..........8..................888888888\n" in found.out
    assert re.search(r"^pp rank   0{40}$", found.out, re.MULTILINE) is None
    assert re.search(r"^pp rank   0+1+$", found.out, re.MULTILINE) is not None


def test_a_terminal_without_unicode_gets_ascii(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoding of stdout decides."""
    from rich.console import ConsoleOptions

    monkeypatch.setattr(ConsoleOptions, "ascii_only", property(lambda _self: True))
    assert run("inspect", SUPER).out.isascii()


@pytest.mark.parametrize("colourless", [False, True])
def test_no_color_leaves_colours_away(
    run: Run, monkeypatch: pytest.MonkeyPatch, colourless: bool
) -> None:
    """A terminal has them, unless NO_COLOR says otherwise; the characters are the same."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if colourless:
        monkeypatch.setenv("NO_COLOR", "1")
    out = run("inspect", SUPER).out
    assert ("\x1b[34m" in out) is not colourless
    assert "888888..888.8888" in re.sub(r"\x1b\[[0-9;]*m", "", out)


def test_a_picture_is_written_and_replaced(run: Run, tmp_path: Path) -> None:
    """Where that is asked for; the layout's stages are in it; nothing else is left."""
    path = tmp_path / "super.svg"
    path.write_text("something else")
    refused = run("inspect", "no/such/model", "--draw", path)  # before any work
    assert (refused.code, refused.out, path.read_text()) == (2, "", "something else")
    assert refused.err.startswith("BR304 the output already exists\n")
    assert "--overwrite" in refused.err
    found = run("inspect", SUPER, "--tp", "2", "--pp", "4", "--draw", path, "--overwrite")
    assert found.code == 0
    text = path.read_text()
    ET.fromstring(text)  # noqa: S314 - our own
    assert "Llama-3_3-Nemotron-Super-49B-v1<" in text
    assert "layout tp2-pp4" in text
    assert list(tmp_path.iterdir()) == [path]


def test_a_png_is_written_where_pillow_is(run: Run, tmp_path: Path) -> None:
    """By its suffix."""
    pytest.importorskip("PIL", reason="needs Pillow, the extra `png`")
    assert run("inspect", SUPER, "--draw", tmp_path / "super.PNG").code == 0
    assert (tmp_path / "super.PNG").read_bytes().startswith(b"\x89PNG\r\n")


def test_a_png_without_pillow_is_refused_with_the_way_to_get_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is read, and with nothing written."""
    monkeypatch.setattr("bridge.drawing.png.find_spec", lambda _name: None)
    found = run("inspect", "no/such/model", "--draw", tmp_path / "super.png")
    assert (found.code, list(tmp_path.iterdir())) == (3, [])
    assert "BR500" in found.err
    assert "nemotron-bridge[png]" in found.err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--draw", "model.jpg"], 2, "BR001 a picture is an .svg or a .png"),
        (["--overwrite"], 2, "BR001 --overwrite is for the picture"),
        (["--draw", "no/such/place/model.svg"], 2, "BR300 the output is in no such directory"),
        (["--suggest-layout", "--gpus", "8"], 2, "--memory SIZE"),
        (["--suggest-layout", "--memory", "80GiB"], 2, "--gpus N"),
        (["--suggest-layout", "--gpus", "8", "--memory", "80GiB", "--tp", "2"], 2, "BR001"),
        (["--suggest-layout", "--gpus", "8", "--memory", "many"], 2, "'many' is not a size"),
        (["--gpus", "8", "--memory", "80GiB"], 2, "add --suggest-layout"),
        (["--gpus-per-node", "4"], 2, "add --suggest-layout"),
        (["--suggest-layout", "--gpus", "8", "--memory", "80"], 2, "--memory 80GiB"),
        (["--suggest-layout", "--gpus", "8", "--memory", "9" * 400], 2, "is not a size"),
        (["--suggest-layout", "--gpus", "8", "--memory", "80GiB", "--blocks"], 2, "--blocks away"),
        (["--recompute-granularity", "full"], 2, "add --purpose training"),
        (["--sequence-length", "1000000"], 2, "max_position_embeddings=131072"),
        (["--suggest-layout", "--gpus", "1", "--memory", "8GiB"], 2, "BR203 no layout"),
        (["--sequence-parallel"], 2, "BR201"),
    ],
)
def test_what_makes_no_sense_is_refused(
    run: Run, arguments: list[str], code: int, says: str
) -> None:
    """One diagnostic, no traceback, nothing on stdout."""
    found = run("inspect", NANO, *arguments)
    assert (found.code, found.out) == (code, "")
    assert says in found.err
    assert "Traceback" not in found.err


@pytest.mark.parametrize(
    "flag", ["--micro-batch-size", "--sequence-length", "--make-vocab-size-divisible-by"]
)
def test_a_size_beyond_all_runs_is_refused_before_a_layout_is_sought(run: Run, flag: str) -> None:
    """At once, by name."""
    fits = ("--suggest-layout", "--gpus", "8", "--memory", "80GiB")
    found = run("inspect", ULTRA, *fits, flag, "9" * 20)
    assert found.code == 2
    assert flag in found.err
    assert "should be less than or equal to" in found.err


def test_memory_is_shown_for_training_as_it_is_asked_for(run: Run) -> None:
    """18 bytes a parameter in bfloat16, the optimizer's 12 shared by the replicas."""
    flags = ("--tp", "2", "--purpose", "training", "--sequence-length", "4096")
    data = json.loads(run("inspect", NANO, *flags, "--data-parallel-size", "4", "--json").out)
    (rank,) = data["memory"]["pp_ranks"]
    assert rank["weights"] == 2 * rank["num_parameters"] == data["pp_ranks"][0]["nbytes_per_rank"]
    assert rank["gradients"] == 4 * rank["num_parameters"]
    assert rank["optimizer"] == pytest.approx(3 * rank["num_parameters"])
    assert rank["total"] == sum(
        rank[part] for part in ("weights", "gradients", "optimizer", "activations", "kv_cache")
    )
    assert data["memory"]["workload"]["sequence_length"] == 4096
    shown = run("inspect", NANO, *flags, "--data-parallel-size", "4").out
    assert "shared by 4 replicas" in shown
    assert f"{rank['total'] / 2**30:.2f} GiB" in shown
    fewer = json.loads(run("inspect", NANO, *flags, "--sequence-parallel", "--json").out)
    assert fewer["memory"]["pp_ranks"][0]["activations"] < rank["activations"]


def test_a_suggested_layout_comes_with_the_flags_that_make_it(run: Run) -> None:
    """Text and JSON say the same; Megatron's flags are those of that layout; ours parse."""
    arguments = ("--suggest-layout", "--gpus", "16", "--memory", "80GiB", "--purpose", "training")
    found = run("inspect", SUPER, *arguments, "--recompute-granularity", "full", "--json")
    assert (found.code, found.err) == (0, "")
    data = json.loads(found.out)
    best = data["suggestions"][0]
    layout = parse_layout(best["layout"], read_spec(SUPER))
    flags = [*layout_flags(layout), "--seq-length", "8192", "--micro-batch-size", "1"]
    flags += ["--use-distributed-optimizer", "--recompute-granularity", "full"]
    flags += ["--recompute-method", "uniform", "--recompute-num-layers", "1"]
    assert best["megatron_flags"] == flags
    assert best["num_layers_per_stage"] == list(layout.num_layers_per_stage)
    shown = run("inspect", SUPER, *arguments, "--recompute-granularity", "full").out
    assert f"Megatron-LM:     {shlex.join(flags)}\n" in shown
    assert f"verify ... --layouts {best['layout']}\n" in shown
    assert f"{best['layout']} is first: " in shown
    for rank in best["memory"]["pp_ranks"]:
        assert f"{rank['num_parameters']:,}" in shown


def test_flags_to_paste_keep_what_the_memory_was_counted_for(run: Run) -> None:
    """The padding of the vocabulary and the dtype, where they are not the usual ones."""
    found = run(
        "inspect", NANO, "--suggest-layout", "--gpus", "1", "--memory", "80GiB",
        "--gpus-per-node", "3000000000", "--make-vocab-size-divisible-by", "64",
        "--dtype", "float32",
    ).out  # fmt: skip
    padding = "--make-vocab-size-divisible-by 64"
    assert f"import ... --tp 1 --pp 1 {padding} --dtype float32\n" in found
    assert re.search(f"^Megatron-LM: .* {padding}$", found, re.MULTILINE)


def test_a_picture_of_a_suggested_layout_shows_its_stages(run: Run, tmp_path: Path) -> None:
    """The best one's."""
    arguments = ("--suggest-layout", "--gpus", "4", "--memory", "80GiB", "--gpus-per-node", "1")
    found = run("inspect", SUPER, *arguments, "--draw", tmp_path / "super.svg")
    assert found.code == 0
    assert " tp1-pp2 " in found.out
    assert "layout tp1-pp2" in (tmp_path / "super.svg").read_text()


def test_the_documentation_shows_what_is_printed_and_drawn(run: Run, tmp_path: Path) -> None:
    """The strip, the layouts that fit, and both pictures, to the character."""
    page = (DOCS / "layouts.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```text\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    strip, ultra, super_49b, flags, _ = blocks
    fits = ("--suggest-layout", "--memory", "80GiB", "--purpose", "training", "--gpus")
    assert strip in run("inspect", SUPER).out
    assert ultra in run("inspect", ULTRA, *fits, "256", "--recompute-granularity", "full").out
    shown = run("inspect", SUPER, *fits, "64", "--sequence-length", "4096").out
    assert super_49b in shown
    assert flags in shown
    for path, name, layout in (
        (ULTRA, "ultra-253b.svg", ("--tp", "8", "--pp", "8")),
        (SUPER, "super-49b.svg", ("--tp", "4", "--pp", "4")),
    ):
        assert f"figures/{name}" in page
        assert run("inspect", path, *layout, "--draw", tmp_path / name).code == 0
        assert (tmp_path / name).read_text() == (DOCS / "figures" / name).read_text()
