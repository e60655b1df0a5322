"""What is measured on a GPU: the sums over canned trials."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import harness.cli  # noqa: F401 - it adds the commands
from bridge.cli import app
from harness.benchmarks import gpu, models
from harness.benchmarks.card import Card
from harness.benchmarks.process import Run
from harness.benchmarks.results import Measurement
from harness.benchmarks.workspace import SetUpError, Workspace, size_of
from harness.suite import load_suite
from harness.suite import select as select_cases
from tests.harness.benchmarks.conftest import SIZE

Answer = Callable[[list[str]], Any]
"""What a command prints, as JSON; an exception's text is how it fails."""

CARD: dict[str, Any] = {
    "samples": {
        "from_host": [0.4, 0.5, 0.6], "copy": [0.01], "float32": [0.02], "bfloat16": [0.002],
        "host_float64": [2.0],
    },
    "nbytes": 10**9, "flops": 10**12, "host_flops": 10**12, "float32_product_ulp": 2.5,
}  # fmt: skip
"""2 GB/s from the host, 200 GB/s within the card; 50, 500 and 0.5 TFLOP/s."""


@pytest.fixture
def canned(
    toys: Workspace, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Workspace, list[list[str]]]]:
    """A workspace on a GPU whose commands are answered, and the commands that it gets."""

    def make(answer: Answer, **changes: object) -> tuple[Workspace, list[list[str]]]:
        commands: list[list[str]] = []

        def fake(_work: Workspace, command: Sequence[str | Path], *, tree: bool = False) -> Run:
            del tree
            words = [str(one) for one in command]
            commands.append(words)
            try:
                found = CARD if "harness.benchmarks.trial_card" in words else answer(words)
            except LookupError as error:
                return Run(seconds=1.0, exit_code=3, peak_rss=1, stderr=str(error))
            return Run(seconds=30.0, exit_code=0, peak_rss=7, stdout=json.dumps(found))

        monkeypatch.setattr(Workspace, "run", fake)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        toys.profile = replace(toys.profile, device="cuda", **changes)  # type: ignore[arg-type]  # of any field
        return toys, commands

    return make


def named(found: Sequence[Measurement]) -> dict[str, Measurement]:
    """By name; where a name occurs twice, the first, which has a warm cache."""
    return {one.name: one for one in reversed(found)}


@pytest.mark.parametrize(
    "group",
    [models.measure_load, gpu.measure_forward, models.measure_stream, models.measure_parity],
)
def test_without_a_gpu_nothing_is_made_and_nothing_fails(
    work: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    group: Callable[[Workspace], list[Measurement]],
) -> None:
    """It is left out, with the reason."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    work.profile = replace(work.profile, device="cuda")
    (found,) = group(work)
    assert (found.status, found.reason) == ("not run", "no GPU")
    assert list(work.directory.iterdir()) == []


def test_forward_passes_are_no_matter_of_a_cpu(work: Workspace) -> None:
    """The flag that would measure them is named."""
    (found,) = gpu.measure_forward(work)
    assert found.status == "not run"
    assert "--device cuda" in found.reason


def test_the_rates_of_a_card_are_those_of_its_medians() -> None:
    """A copy within it is read and written, one from the host crosses once."""
    card = Card(**CARD)
    assert card.from_host == pytest.approx(2e9)
    assert card.copy == pytest.approx(2e11)
    assert card.products("float32") == pytest.approx(50e12)
    assert card.products("host_float64") == pytest.approx(0.5e12)
    row = card.products_row("stream", "host_float64")
    assert (row.name, row.conditions) == ("matmul on the host", {"dtype": "float64"})
    assert row.values == {"gflop_per_second": pytest.approx(500)}
    assert card.products_row("stream", "float32").values["float32_product_ulp"] == 2.5
    assert "float32_product_ulp" not in card.products_row("forward", "bfloat16").values
    assert card.copy_row("load", "copy", "from_host").values == {
        "gb_per_second": pytest.approx(2.0)
    }


def test_a_card_is_measured_once(canned: Callable[..., tuple[Workspace, list[list[str]]]]) -> None:
    """Every group is held against the same."""
    work, commands = canned(lambda _words: None)
    assert Card.of(work) is Card.of(work)
    assert len(commands) == 1


def test_a_card_that_cannot_be_measured_says_why(
    toys: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group is then reported as failed."""
    broken = Run(seconds=1.0, exit_code=1, peak_rss=1, stderr="CUDA error: out of memory")
    monkeypatch.setattr(Workspace, "run", lambda *_: broken)
    with pytest.raises(SetUpError, match=r"cannot measure the card: .*out of memory"):
        Card.of(toys)


def loading(words: list[str]) -> dict[str, float]:
    """Reading takes 8 s on one thread and 2 s on four, `load_file` 3 s, direct load 1 s."""
    if "harness.benchmarks.trial_read" in words:
        return {"read_seconds": 8.0 / int(words[-1]), "nbytes": 5}
    if "harness.benchmarks.trial_load_file" in words:
        return {"load_file_seconds": 3.0, "nbytes": 5}
    assert words[-2:] == ["bfloat16", "cuda"]
    return {"start_seconds": 9.0, "build_seconds": 0.5, "load_seconds": 1.0, "model_bytes": 5}


class Four:
    """Limits of a machine with four cores."""

    threads = 4


def test_loading_is_held_against_reading_load_file_and_the_copy(
    canned: Callable[..., tuple[Workspace, list[list[str]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loading alone counts, not its process; the fastest reading is what it is held against."""
    monkeypatch.setattr(gpu, "TransferLimits", Four)
    work, commands = canned(loading)
    found = models.measure_load(work)
    warm = [one.name for one in found if one.conditions.get("cache") == "warm"]
    assert warm == [
        "read, 1 at once", "read, 4 at once", "safetensors load_file to cuda",
        "load into GPTModel on cuda",
    ]  # fmt: skip
    assert len([one for one in found if one.conditions.get("cache") == "cold"]) == 4
    assert found[0].name == "copy from pinned memory"
    assert found[0].values["gb_per_second"] == pytest.approx(2.0)
    nbytes, rows = size_of(work.hf(SIZE)), named(found)
    load = rows["load into GPTModel on cuda"]
    assert load.samples == [1.0]
    assert load.values == {
        "peak_rss_bytes": 7.0,
        "start_seconds": 9.0,
        "build_seconds": 0.5,
        "model_bytes": 5.0,
        "gb_per_second": pytest.approx(nbytes / 1e9),
        "ratio_to_read": pytest.approx(0.5),
        "ratio_to_load_file": pytest.approx(1 / 3),
        "built_ratio_to_load_file": pytest.approx(0.5),
        "share_of_host_copy": pytest.approx(nbytes / 2e9),
    }
    plain = rows["safetensors load_file to cuda"]
    assert plain.values["ratio_to_read"] == pytest.approx(1.5)
    assert plain.values["share_of_host_copy"] == pytest.approx(nbytes / 6e9)
    assert "built_ratio_to_load_file" not in plain.values
    assert set(rows["read, 4 at once"].values) == {"peak_rss_bytes", "gb_per_second"}
    assert commands[0][2:5] == ["harness.benchmarks.trial_card", "cuda", str(1 << 30)]


def test_a_loading_that_fails_leaves_the_others_their_figures(
    canned: Callable[..., tuple[Workspace, list[list[str]]]],
) -> None:
    """With what it said; a trial that says nothing of its time has failed too."""

    def answer(words: list[str]) -> dict[str, float]:
        if "harness.benchmarks.trial_load" in words:
            raise LookupError("out of memory")
        return {} if "harness.benchmarks.trial_load_file" in words else loading(words)

    rows = named(models.measure_load(canned(answer)[0]))
    assert rows["load into GPTModel on cuda"].reason == "exit code 3: out of memory"
    assert rows["safetensors load_file to cuda"].reason == "it did not print load_file_seconds"
    assert rows["read, 1 at once"].status == "measured"


def test_forward_passes_are_held_against_hugging_face_and_matmul(
    canned: Callable[..., tuple[Workspace, list[list[str]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1000 tokens in 0.25 s beside 0.5 s; 2e12 of 500e12 operations per second, so 1.6 % are used.

    The configuration is the toy's, whose operations are counted elsewhere.
    """
    answer = {
        "layers": "te", "reference": "transformers, sdpa",
        "shapes": [
            {"batch": 2, "sequence": 500, "difference": 0.009,
             "samples": {"ours": [0.25], "theirs": [0.5]}},
        ],
    }  # fmt: skip
    monkeypatch.setattr(gpu, "_flops", lambda *_: 2 * 10**12)
    work, commands = canned(lambda _words: answer, forward_shapes=((2, 500),), forward_repeats=7)
    matmul, theirs, ours = gpu.measure_forward(work)
    assert (matmul.name, matmul.conditions) == ("matmul", {"dtype": "bfloat16"})
    assert commands[-1][2:3] + commands[-1][4:] == [
        "harness.benchmarks.trial_forward", "bfloat16", "cuda", "7", "2x500",
    ]  # fmt: skip
    assert (theirs.name, ours.name) == ("transformers, sdpa", "GPTModel, te layers")
    assert ours.conditions == {
        "size_bytes": size_of(work.hf(SIZE)), "batch": 2, "sequence": 500, "dtype": "bfloat16",
    }  # fmt: skip
    assert ours.values == {
        "tokens_per_second": pytest.approx(4000),
        "gflop_per_second": pytest.approx(8000),
        "share_of_matmul": pytest.approx(0.016),
        "ratio_to_hf": pytest.approx(0.5),
        "logits_difference": 0.009,
    }
    assert theirs.values == {
        "tokens_per_second": pytest.approx(2000),
        "gflop_per_second": pytest.approx(4000),
        "share_of_matmul": pytest.approx(0.008),
    }


def test_the_operations_are_those_of_the_configuration(work: Workspace) -> None:
    """Half a gigabyte is one of Nano-8B's blocks: 218,112,000 parameters and its output layer."""
    work.profile = replace(work.profile, sizes=(500_000_000,))
    config = json.loads(work.config(500_000_000).read_text("utf-8"))
    assert config["num_hidden_layers"] == 1
    parameters = 218_112_000 + 4096 * config["vocab_size"] + 4096
    expected = 2 * parameters * 20 + 2 * 2 * 10 * 10 * 4096
    assert gpu._flops(work, 2, 10) == expected


def streaming(one_block: float, all_blocks: float) -> Answer:
    """Evidence that took this long."""
    return lambda words: {"seconds": one_block if "--blocks" in words else all_blocks}


def test_streaming_is_held_against_card_and_host(
    canned: Callable[..., tuple[Workspace, list[list[str]]]],
) -> None:
    """31 blocks of 218,112,000 parameters in 15 s; the 32nd, and all the rest of 10 s, is start.

    16 bytes a parameter at 200 GB/s, 3 x 2 x 48 operations at 50 TFLOP/s, 2 x 2 x 48 at 0.5.
    """
    work, commands = canned(streaming(10.0, 25.0))
    found = models.measure_stream(work)
    assert [one.name for one in found[:3]] == ["copy on cuda", "matmul", "matmul on the host"]
    stream = found[3]
    walked = 31 * 218_112_000
    assert stream.samples == [30.0]
    assert stream.values == {
        "parameters": 32 * 218_112_000.0,
        "parameters_per_second": pytest.approx(walked / 15),
        "start_seconds": pytest.approx(10 - 15 / 31),
        "share_of_copy": pytest.approx(16 * walked / 200e9 / 15),
        "share_of_matmul": pytest.approx(288 * walked / 50e12 / 15),
        "share_of_host_matmul": pytest.approx(192 * walked / 0.5e12 / 15),
        "share_of_bound": pytest.approx(192 * walked / 0.5e12 / 15),
        "peak_rss_bytes": 7.0,
    }
    assert ["--blocks" in words for words in commands] == [False, True, False]


def test_a_stream_that_gains_nothing_is_no_figure(
    canned: Callable[..., tuple[Workspace, list[list[str]]]],
) -> None:
    """All blocks in less time than one: the machine was busy with something else."""
    *rows, stream = models.measure_stream(canned(streaming(25.0, 24.0))[0])
    assert [one.status for one in rows] == ["measured"] * 3
    assert stream.status == "failed"
    assert "1.0 s less" in stream.reason


def test_a_proof_that_fails_is_no_figure(
    canned: Callable[..., tuple[Workspace, list[list[str]]]],
) -> None:
    """Its exit code is the reason."""

    def answer(_words: list[str]) -> None:
        raise LookupError("1 failed")

    (stream,) = models.measure_stream(canned(answer)[0])
    assert (stream.status, stream.reason) == ("failed", "exit code 3: 1 failed")


def test_parity_tells_layers_apart(
    canned: Callable[..., tuple[Workspace, list[list[str]]]],
) -> None:
    """The seconds of Transformer Engine's cases are not those of the local ones."""
    cases = [
        {"check": "logits", "layers": layers, "status": status, "seconds": seconds}
        for layers, status, seconds in (
            ("local", "passed", 1.0),
            ("te-unfused", "passed", 2.0),
            ("te-unfused", "not run", 0.0),
        )
    ]
    found = models.measure_parity(canned(lambda _words: {"cases": cases})[0])
    assert [(one.name, list(one.samples)) for one in found] == [
        ("the run", [30.0]),
        ("a case of logits", [1.0]),
        ("a case of logits, te-unfused layers", [2.0]),
    ]


def test_the_cases_on_a_gpu_are_a_few_of_both_kinds_of_layers() -> None:
    """Of its own suite, and all of them on the GPU."""
    words = list(models._GPU_CASES)
    patterns = [word for before, word in pairwise(words) if before[2:] == "select"]
    chosen = select_cases(load_suite(words[words.index("--suite") + 1]).cases, patterns)
    assert {case.layers for case in chosen} == {"local", "te-unfused"}
    assert {case.device for case in chosen} == {"cuda"}
    assert {"logits", "blocks", "gradients"} <= {case.check for case in chosen}
    assert len(chosen) < 40


def test_the_commands_are_ones_that_the_program_knows(
    canned: Callable[..., tuple[Workspace, list[list[str]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for what they would run, each says so."""
    answer = streaming(1.0, 2.0)
    work, commands = canned(lambda words: {"cases": []} if "parity" in words else answer(words))
    models.measure_stream(work)
    models.measure_parity(work)
    monkeypatch.undo()
    asked = [command for command in commands if {"verify", "parity"} & set(command)]
    assert len(asked) == 3
    for command in asked:
        words = [*command[command.index("harness") + 1 :], "--list"]
        found = CliRunner().invoke(app, words)  # in this process: only the options are in question
        assert found.exit_code == 0, found.output
        cases = json.loads(found.stdout)
        assert cases
        assert all("/cuda" in case for case in cases)
