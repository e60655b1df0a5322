"""`verify` of a streamed model, as a user calls it: flags, what is said, exit codes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

import harness.cli  # noqa: F401 - it adds the commands
from bridge.cli import app
from bridge.errors import UsageError
from bridge.spec import ModelSpec
from harness import cli_stream
from harness.cli_stream import StreamOptions
from harness.errors import ResumeError
from harness.locations import suites_dir
from harness.toys import toy_named, write_checkpoint

ULTRA = suites_dir() / "variants" / "Llama-3_1-Nemotron-Ultra-253B-v1.json"


def options_of(
    *, stream: bool | None = None, config: Path | None = None, blocks: str | None = None
) -> StreamOptions:
    """What the command was given."""
    return StreamOptions(config=config, seed=0, stream=stream, blocks=blocks, memory_budget="4GiB")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a toy, alone."""
    path = tmp_path_factory.mktemp("models") / "mine.json"
    path.write_text(json.dumps(toy_named("51b").config_for("bfloat16")), "utf-8")
    return path


def spec_of(path: Path) -> ModelSpec:
    """What the bridge reads there."""
    from bridge.convert import read_spec

    return read_spec(path)


def refused(*arguments: str | Path) -> UsageError:
    """The error that a call of `verify` ends with, before it has run anything."""
    result = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    assert isinstance(result.exception, UsageError), result.output
    return result.exception


def test_a_configuration_alone_is_proved(config: Path) -> None:
    """Exit code 0; the checks that cannot be answered are counted; one document on stdout."""
    done = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", "harness", "verify", "--config", str(config), "--seed", "3",
         "--blocks", "distinct", "--memory-budget", "64MiB", "--json"],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    evidence = json.loads(done.stdout)
    ids = [case["id"] for case in evidence["cases"] if case["status"] == "passed"]
    assert sorted(ids) == [
        "blocks/mine/tp1-pp1/float32/long",
        "blocks/mine/tp1-pp1/float32/short",
        "config/mine/float32",
        "logits/mine/tp1-pp1/float32/long",
        "logits/mine/tp1-pp1/float32/short",
    ]
    left = {case["check"]: case["summary"] for case in evidence["cases"] if case["id"] not in ids}
    assert left == dict.fromkeys(
        ("round_trip", "placement", "resharding", "rope", "gradients", "generation"), "streamed"
    )
    assert "only blocks 0-7" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_cases_are_listed_without_running_them(config: Path) -> None:
    """As of any run."""
    result = CliRunner().invoke(
        app, ["verify", "--config", str(config), "--checks", "blocks", "--list"]
    )
    assert result.exit_code == 0
    assert "blocks/mine/tp1-pp1/float32/long" in result.output


def test_a_model_is_one_or_the_other(config: Path) -> None:
    """Neither and both are bad usage."""
    assert "--hf-model" in str(refused())
    assert "--config" in str(refused("--hf-model", config.parent, "--config", config))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--layouts", "tp2-pp1"),
        ("--layers", "te-fused"),
        ("--reference-logits", "x.safetensors"),
        ("--trust-remote-code", None),
        ("--no-stream", None),
        ("--checks", "gradients,placement"),
        ("--blocks", "99"),
        ("--memory-budget", "many"),
    ],
)
def test_what_a_streamed_model_cannot_do_is_refused(
    config: Path, flag: str, value: str | None
) -> None:
    """Before any work, with a hint."""
    error = refused("--config", config, flag, *([] if value is None else [value]))
    assert error.hint


def test_a_resident_model_has_layouts_and_layers(config: Path) -> None:
    """And is all of it there; blocks, and what the walk has no part in, are another matter."""
    asked = ["verify", "--config", str(config), "--resident", "--checks", "logits", "--list"]
    result = CliRunner().invoke(
        app, [*asked, "--layouts", "tp2-pp1,tp1-pp2", "--device", "cuda", "--layers", "te-fused"]
    )
    assert result.output.split() == [
        f"logits/mine/{layout}/float32/{probe}/cuda/te-fused"
        for layout in ("tp2-pp1", "tp1-pp2")
        for probe in ("short", "long")
    ]
    assert "--blocks" in str(refused("--config", config, "--resident", "--blocks", "0"))
    assert "--resident" in str(refused("--config", config, "--resident", "--no-stream"))


def test_no_run_is_resumed_by_one_that_proves_otherwise(config: Path, tmp_path: Path) -> None:
    """Cases are called alike whether a model is walked through or whole on ranks."""
    asked = ["verify", "--config", str(config), "--checks", "logits", "--select", "short"]
    asked += ["--layouts", "tp1-pp1", "--report", str(tmp_path)]
    walked = CliRunner().invoke(app, asked)
    assert walked.exit_code == 0, walked.output
    result = CliRunner().invoke(app, [*asked, "--resident", "--resume"])
    assert isinstance(result.exception, ResumeError)
    assert "options differ" in str(result.exception)


def test_the_only_layout_may_be_named(config: Path) -> None:
    """It is the one that is run."""
    result = CliRunner().invoke(
        app, ["verify", "--config", str(config), "--layouts", "tp1-pp1", "--list"]
    )
    assert result.exit_code == 0


def test_only_what_does_not_fit_is_streamed_unasked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, config: Path
) -> None:
    """Two models of Ultra's size fit nowhere; a toy fits wherever it can run at all."""
    free = psutil.virtual_memory()._replace(available=2 << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    plain: dict[str, Any] = {"dtype": "float32", "device": "cpu", "wants_whole": False}
    toy, ultra = spec_of(config), spec_of(ULTRA)
    assert not cli_stream.is_streamed(options_of(), toy, **plain)
    assert capsys.readouterr().err == ""
    assert cli_stream.is_streamed(options_of(), ultra, **plain)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--no-stream" in said
    assert not cli_stream.is_streamed(options_of(stream=False), ultra, **plain)
    assert not cli_stream.is_streamed(options_of(), ultra, **plain | {"wants_whole": True})
    assert cli_stream.is_streamed(options_of(stream=True), toy, **plain)
    assert cli_stream.is_streamed(options_of(blocks="0"), toy, **plain)


def test_a_streamed_checkpoint_is_asked_the_same(tmp_path: Path) -> None:
    """--stream on a checkpoint that would fit; its report has everything a report has."""
    write_checkpoint(toy_named("nano-4b"), tmp_path / "hf")
    done = CliRunner().invoke(
        app, ["verify", "--hf-model", str(tmp_path / "hf"), "--stream",
              "--report", str(tmp_path / "report"), "--checks", "logits,blocks,rope"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "4 passed, 0 failed, 1 not run (streamed)" in done.stdout
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"evidence.json", "report.html", "junit.xml", "journal.jsonl"} <= names
    assert "streamed.npz" not in names


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and what an import makes of it."""
    from bridge.convert import import_checkpoint

    place = tmp_path_factory.mktemp("pair")
    write_checkpoint(toy_named("super-49b-v1"), place / "hf")
    import_checkpoint(place / "hf", place / "megatron")
    return place / "hf", place / "megatron"


def streamed(hf: Path, megatron: Path) -> list[dict[str, Any]]:
    """The failed cases of a pair, and that the command says so."""
    done = CliRunner().invoke(
        app, ["verify", "--hf-model", str(hf), "--megatron-path", str(megatron), "--stream",
              "--json"],
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    cases = json.loads(done.stdout)["cases"]
    failed = [case for case in cases if case["status"] == "failed"]
    assert done.exit_code == (1 if failed else 0), done.stderr
    assert [case["check"] for case in cases if case["status"] == "passed"]
    return failed


def test_a_pair_is_also_compared_bit_by_bit(pair: tuple[Path, Path]) -> None:
    """A healthy one passes."""
    assert streamed(*pair) == []


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-6},
        {"rope_scaling": {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0,
                          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_configuration_that_is_not_the_checkpoints_fails(
    change: dict[str, Any], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """All three sides would take it, and agree: the checkpoint's own word is what contradicts."""
    hf, megatron = pair
    shutil.copytree(hf, tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), "utf-8")
    failed = streamed(tmp_path / "hf", megatron)
    assert "round_trip" in {case["check"] for case in failed}
    places = " ".join(place for case in failed for place in case["places"])
    assert next(iter(change)) in places or "rope" in places


def test_a_row_that_no_probe_reads_fails_all_the_same(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Of a big vocabulary the probes name a few tokens."""
    from safetensors.torch import load_file, save_file

    hf, megatron = pair
    shutil.copytree(hf, tmp_path / "hf")
    file = next(
        one
        for one in sorted((tmp_path / "hf").glob("*.safetensors"))
        if "model.embed_tokens.weight" in load_file(one)
    )
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][400] = 0
    save_file(tensors, file, {"format": "pt"})
    failed = streamed(tmp_path / "hf", megatron)
    places = " ".join(place for case in failed for place in case["places"])
    assert "model.embed_tokens.weight[400, 0]" in places


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--blocks", "0-999999999"), "no blocks 0-999999999"),
        (("--blocks", "3-1"), "no blocks 3-1"),
        (("--memory-budget", "20KiB"), "too small"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_made(
    flags: tuple[str, ...], message: str, config: Path
) -> None:
    """Neither a set of a billion numbers nor a buffer of less than nothing."""
    result = CliRunner().invoke(app, ["verify", "--config", str(config), *flags])
    assert isinstance(result.exception, UsageError), result.output
    assert message in str(result.exception)


def test_a_configuration_has_no_pair_and_a_url_is_no_directory(config: Path) -> None:
    """Refused, not guessed."""
    assert "no weights" in str(refused("--config", config, "--megatron-path", config.parent))
    assert "no URL" in str(refused("--hf-model", config, "--megatron-path", "s3://bucket/x"))


def test_a_full_disk_ends_a_streamed_run_with_one_error(config: Path, tmp_path: Path) -> None:
    """Files of at most 8 KiB, here: the states of a toy are more."""
    limited = '"$0" -m harness verify --config "$1" --checks blocks --report "$2"'
    done = subprocess.run(  # noqa: S603 - our own command
        ["bash", "-c", f"ulimit -f 8; exec {limited}",  # noqa: S607
         sys.executable, str(config), str(tmp_path / "report")],
        capture_output=True, text=True, check=False, timeout=240,
        preexec_fn=lambda: signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot write the report" in done.stderr
