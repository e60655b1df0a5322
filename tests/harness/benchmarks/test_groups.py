"""The groups on toys: real commands, real memory, and failures that end nothing else."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import psutil
import pytest

from bridge.convert import read_spec
from bridge.parameters import num_parameters
from harness.benchmarks import conversions, groups, models, profile, trial_oracle
from harness.benchmarks.groups import GROUPS, measure
from harness.benchmarks.results import Measurement
from harness.benchmarks.workspace import SetUpError, Workspace
from tests.harness.benchmarks.conftest import SIZE


def named(found: list[Measurement]) -> dict[str, Measurement]:
    """By name; where a name occurs twice, the first, which has a warm cache."""
    return {one.name: one for one in reversed(found)}


def test_import_is_measured_warm_and_cold_beside_two_copies(
    toys: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the verification's own share, and limits where there are some."""
    monkeypatch.setattr(profile, "RATIOS_FROM_BYTES", SIZE)
    found = conversions.measure_import(toys)
    warm = [one.name for one in found if one.conditions["cache"] == "warm"]
    assert warm == ["cp -r", "import --verify none", "cp -r, on disk", "import --verify bits"]
    assert {one.status for one in found} <= {"measured", "not run"}
    by_name = named(found)
    plain, verified = by_name["import --verify none"], by_name["import --verify bits"]
    assert "verify_seconds" not in plain.values
    assert verified.values["verify_seconds"] > 0
    copy, without, whole = (
        statistics.median(by_name[name].samples)
        for name in ("cp -r", "import --verify none", "import --verify bits")
    )
    assert verified.values["added_ratio_to_cp"] == pytest.approx((whole - without) / copy)
    assert "added_ratio_to_cp" not in plain.values
    assert {one.name for one in plain.limits} == {"peak_rss_bytes", "ratio_to_cp"}
    assert {one.name for one in verified.limits} == {"peak_rss_bytes", "added_ratio_to_cp"}
    assert all(one.limits == [] for one in found if one.name.startswith("cp"))
    assert {"ratio_to_cp", "ratio_to_cp_on_disk", "convert_seconds"} <= set(plain.values)


def test_a_small_checkpoint_is_held_to_no_ratio(toys: Workspace) -> None:
    """Its `cp` leaves everything in memory."""
    limits = {limit.name for one in conversions.measure_import(toys) for limit in one.limits}
    assert limits == {"peak_rss_bytes"}


def test_budgets_set_the_limit_of_memory(toys: Workspace) -> None:
    """Half a GiB above 128 MiB, for both directions."""
    found = conversions.measure_budgets(toys)
    assert [one.name for one in found] == ["import --verify bits", "export --verify bits"]
    for one in found:
        assert one.status == "measured", one.reason
        (limit,) = [limit for limit in one.limits if limit.name == "peak_rss_bytes"]
        assert limit.limit == 640 << 20
        assert limit.value == one.values["peak_rss_bytes"] > 10 << 20


def test_a_damaged_checkpoint_fails_its_rows_and_no_others(toys: Workspace) -> None:
    """`cp` does not mind; import names the file."""
    file = min((toys.directory / f"hf-{SIZE}").glob("*.safetensors"))
    toys.megatron(SIZE)
    file.write_bytes(file.read_bytes()[:1000])
    found = named(conversions.measure_sizes(toys))
    assert found["cp -r"].status == "measured"
    assert found["export --verify none"].status == "measured"
    assert found["import --verify none"].status == "failed"
    assert file.name in found["import --verify none"].reason


def test_a_peer_that_is_not_installed_is_left_out(work: Workspace) -> None:
    """Without making a checkpoint first."""
    work.peer_python = sys.executable
    (peer,) = models.measure_peer(work)
    assert peer.status == "not run"
    assert "not installed" in peer.reason


_PEER = """
import shutil

class AutoBridge:
    @staticmethod
    def import_ckpt(hf, megatron):
        shutil.copytree(hf, megatron)

    @classmethod
    def from_hf_pretrained(cls, hf):
        return cls()

    def export_ckpt(self, megatron, target, show_progress):
        shutil.copytree(megatron, target)
"""


def test_a_peer_that_is_installed_is_measured_both_ways(toys: Workspace, tmp_path: Path) -> None:
    """A stand-in with its calls, which copies; what it makes is removed with the workspace."""
    package = tmp_path / "site" / "megatron" / "bridge"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(_PEER)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    toys.peer_python = str(python)
    found = models.measure_peer(toys)
    assert [(one.name, one.status, one.reason) for one in found] == [
        ("cp -r", "measured", ""),
        ("Megatron-Bridge import", "measured", ""),
        ("Megatron-Bridge export", "measured", ""),
    ]
    assert all("ratio_to_cp" in one.values for one in found[1:])
    (package / "__init__.py").write_text("raise SystemExit('no GPU')")
    (failed,) = models.measure_peer(toys)
    assert (failed.name, failed.status) == ("Megatron-Bridge import", "failed")
    assert "no GPU" in failed.reason


def test_too_little_memory_leaves_loading_out(
    work: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine must not swap for a figure."""

    class Full:
        available = 1 << 30

    monkeypatch.setattr(psutil, "virtual_memory", Full)
    (found,) = models.measure_load(work)
    assert found.status == "not run"
    assert "1.1 GB of memory available" in found.reason


@pytest.mark.ranks
def test_loading_says_how_large_the_model_is(toys: Workspace) -> None:
    """bfloat16, with the rows that pad the vocabulary; `cp` beside it."""
    found = named(models.measure_load(toys))
    load = found["load into GPTModel on cpu"]
    assert load.status == "measured", load.reason
    spec = read_spec(toys.hf(SIZE))
    padding = spec.padded_vocab_size(1, make_vocab_size_divisible_by=128) - spec.vocab_size
    copies = 1 if spec.share_embeddings_and_output_weights else 2
    expected = 2 * (num_parameters(spec) + copies * padding * spec.hidden_size)
    assert load.values["model_bytes"] == expected
    assert load.values["load_seconds"] < load.samples[0]
    assert "load_ratio_to_cp" in load.values


def test_a_group_that_cannot_be_set_up_is_a_failure_and_the_rest_runs(
    work: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reason; an error of the system is one too."""

    def cannot(_work: Workspace) -> list[Measurement]:
        raise SetUpError("cannot make hf-1: disk full")

    def breaks(_work: Workspace) -> list[Measurement]:
        raise OSError(28, "No space left on device")

    def works(_work: Workspace) -> list[Measurement]:
        return [Measurement(group="c", name="n", samples=(1.0,))]

    fakes = MappingProxyType({"a": cannot, "b": breaks, "c": works})
    monkeypatch.setattr(groups, "GROUPS", fakes)
    found = measure(work, ["a", "b", "c"])
    assert [one.status for one in found] == ["failed", "failed", "measured"]
    assert found[0].reason == "cannot make hf-1: disk full"
    assert "No space left" in found[1].reason


def test_every_group_has_a_docstring() -> None:
    """They are the documentation of `--only`."""
    assert all(group.__doc__ for group in GROUPS.values())


def test_the_oracle_s_work_is_counted_by_hand() -> None:
    """Two tokens, three parameters, width five: 2*3*2 for the weights, 4*2*2*5 for the scores."""
    assert trial_oracle.matmul_flops(3, 2, 5) == 12 + 80


def test_the_oracle_s_block_is_that_of_the_configuration(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many parameters as the bridge counts in a block."""
    path = toy / "config.json"
    trial_oracle.main(path, tokens=4, repeats=2)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    config = json.loads(path.read_text("utf-8"))
    sizes = []
    for layers in (1, 2):
        file = tmp_path / f"{layers}.json"
        file.write_text(json.dumps(config | {"num_hidden_layers": layers}))
        sizes.append(num_parameters(read_spec(file)))
    assert found["parameters"] == sizes[1] - sizes[0]
    assert len(found["samples"]) == 2
    assert found["token_parameters_per_second"] == pytest.approx(
        4 * found["parameters"] / float(np.median(found["samples"]))
    )
