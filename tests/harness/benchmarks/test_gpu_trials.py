"""The trials of a GPU's figures, on a CPU where they are small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.benchmarks.card import Card
from harness.benchmarks.process import OURS
from harness.benchmarks.trial_forward import relative_difference, shape_named
from harness.benchmarks.workspace import Workspace


def printed(work: Workspace, trial: str, *arguments: str | Path) -> dict[str, Any]:
    """What a trial prints, run as the groups run it."""
    run = work.run([OURS[0], "-m", f"harness.benchmarks.{trial}", *arguments])
    found = run.json()
    assert run.failure == ""
    assert found is not None
    return found


def test_the_card_s_trial_runs_on_a_cpu(work: Workspace) -> None:
    """Two samples of each; what they move and compute is counted by hand."""
    found = printed(work, "trial_card", "cpu", "1000000", "64", "32", "2")
    card = Card(**found)
    assert set(card.samples) == {"from_host", "copy", "float32", "bfloat16", "host_float64"}
    assert {len(samples) for samples in card.samples.values()} == {2}
    assert (card.nbytes, card.flops, card.host_flops) == (1_000_000, 524_288, 65_536)
    assert card.float32_product_ulp is None


@pytest.mark.parametrize("threads", ["1", "3"])
def test_every_byte_is_read_once(work: Workspace, tmp_path: Path, threads: str) -> None:
    """Also those of files that are no multiple of a piece, and of folders."""
    files = tmp_path / "files"
    (files / "folder").mkdir(parents=True)
    (files / "a").write_bytes(b"a" * (9 << 20))
    (files / "folder" / "b").write_bytes(b"b" * 3)
    (files / "empty").write_bytes(b"")
    found = printed(work, "trial_read", files, threads)
    assert found["nbytes"] == (9 << 20) + 3
    assert found["read_seconds"] > 0


def test_load_file_loads_the_checkpoint(work: Workspace, toy: Path) -> None:
    """As many bytes as the index counts."""
    found = printed(work, "trial_load_file", toy, "cpu")
    index = toy / "model.safetensors.index.json"
    expected = json.loads(index.read_text("utf-8"))["metadata"]["total_size"]
    assert found["nbytes"] == expected
    assert found["load_file_seconds"] > 0


@pytest.mark.ranks
def test_both_models_compute_the_same(work: Workspace, toy: Path) -> None:
    """A benchmark of something else would say nothing."""
    found = printed(work, "trial_forward", toy, "float32", "cpu", "2", "1x8", "2x16")
    assert (found["layers"], found["reference"]) == ("local", "transformers, sdpa")
    assert [(one["batch"], one["sequence"]) for one in found["shapes"]] == [(1, 8), (2, 16)]
    for one in found["shapes"]:
        assert {name: len(samples) for name, samples in one["samples"].items()} == {
            "ours": 2,
            "theirs": 2,
        }
        assert 0 < one["difference"] < 1e-5


def test_the_difference_is_relative_to_the_reference() -> None:
    """Differences 4 and 0 beside 3 and 0: four thirds."""
    ours, theirs = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[3.0, 0.0]]])
    assert relative_difference(ours, theirs) == pytest.approx(4 / 3)
    with pytest.raises(ValueError, match="zip"):
        relative_difference(ours, theirs.expand(2, 1, 2))


def test_a_shape_is_batch_by_sequence() -> None:
    """In this order."""
    assert shape_named("8x2048") == (8, 2048)
