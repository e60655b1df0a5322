"""Checkpoints have the size asked for; a disk without room is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.convert import read_spec
from bridge.errors import UsageError
from bridge.parameters import num_parameters
from harness.benchmarks.workspace import (
    SetUpError,
    Workspace,
    check_space,
    config_of_size,
    size_of,
)


@pytest.mark.parametrize("size", [500_000_000, 1_000_000_000, 2_000_000_000, 8_000_000_000])
def test_a_configuration_has_the_size_asked_for(size: int, work: Workspace) -> None:
    """As the bridge counts it; the dimensions stay Nano-8B's."""
    spec = read_spec(work.config(size))
    assert 2 * num_parameters(spec) == pytest.approx(size, rel=0.01)
    assert (spec.hidden_size, spec.num_attention_heads, spec.kv_channels) == (4096, 32, 128)


def test_what_cannot_hold_a_layer_is_refused() -> None:
    """One has 436 MB."""
    with pytest.raises(UsageError, match="too small"):
        config_of_size(400_000_000)


def test_a_disk_without_room_is_refused_before_any_work(tmp_path: Path) -> None:
    """With the figures."""
    check_space(tmp_path, 1)
    with pytest.raises(UsageError, match="1000000000 GB are needed"):
        check_space(tmp_path, 10**18)


def test_what_cannot_be_made_says_what_and_why(work: Workspace) -> None:
    """The command's own words."""
    work.config(500_000_000).write_text("{}")
    with pytest.raises(SetUpError, match=r"cannot make hf-500000000: exit code 2: .*BR10"):
        work.hf(500_000_000)


def test_a_checkpoint_is_made_once_and_released_but_for_the_main_size(work: Workspace) -> None:
    """The largest is what most is measured with."""
    toy = work.toy()
    before = (toy / "config.json").stat().st_mtime_ns
    assert (work.toy() / "config.json").stat().st_mtime_ns == before
    for size in (1, work.profile.main_size):
        (work.directory / f"hf-{size}").mkdir()
        work.release(size)
    assert not (work.directory / "hf-1").exists()
    assert (work.directory / f"hf-{work.profile.main_size}").exists()


def test_the_size_of_a_directory_is_that_of_its_files(tmp_path: Path) -> None:
    """At any depth."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"123")
    (tmp_path / "c").write_bytes(b"4567")
    assert size_of(tmp_path) == 7
