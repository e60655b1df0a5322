"""What `--verify auto` adds: one block of each kind, smallest first, and what it leaves out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from bridge.convert import import_checkpoint, read_spec
from bridge.parameters import block_num_parameters
from bridge.storage.remote import parse_location
from harness import cli_blocks
from harness.block_parity import BUDGET, prove_blocks, within
from harness.locations import suites_dir
from harness.oracle import read_config
from harness.toys import toy_named, write_checkpoint
from harness.toys.configs import published_config

SUPER = "Llama-3_3-Nemotron-Super-49B-v1"
ULTRA = "Llama-3_1-Nemotron-Ultra-253B-v1"


@pytest.fixture(autouse=True)
def restore_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what `bridge.platform` changes of torch and of the environment for the CPU."""
    for name in ("current_device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(torch.cuda, name))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy and its conversion."""
    root = tmp_path_factory.mktemp("pair")
    write_checkpoint(toy_named("51b"), root / "hf")
    import_checkpoint(root / "hf", root / "megatron")
    return root


def test_a_pair_that_fits_the_budget_is_proved_by_all_its_kinds(pair: Path) -> None:
    """Eight blocks, each of its own kind; nothing is left out."""
    found = prove_blocks(pair / "hf", pair / "megatron")
    assert (found.status, list(found.blocks), found.left_out) == ("passed", list(range(8)), {})
    assert found.command is None
    (line,) = found.lines()
    assert line.startswith("block parity passed: 8 kinds of blocks (0-7), ")


def test_beyond_the_budget_the_smallest_are_taken_and_the_rest_is_said(pair: Path) -> None:
    """With the command for it, which names the blocks."""
    spec = read_spec(pair / "hf")
    sizes = [block_num_parameters(spec, layer_idx) for layer_idx in range(8)]
    least = sorted(sizes)[:3]
    found = prove_blocks(pair / "hf", pair / "megatron", budget=sum(least))
    assert sorted(sizes[layer_idx] for layer_idx in found.blocks) == least
    assert found.num_parameters == sum(least)
    left = sorted(set(range(8)) - set(found.blocks))
    assert sorted(found.left_out or {}) == left
    assert found.command is not None
    assert found.command.endswith("--checks blocks --blocks " + found.command.split()[-1])
    assert "left out: block" in found.lines()[1]
    assert found.to_dict()["left_out"].keys() == {str(layer_idx) for layer_idx in left}


def test_no_block_within_the_budget_is_no_pass(pair: Path) -> None:
    """It says so, and what would do it."""
    found = prove_blocks(pair / "hf", pair / "megatron", budget=1)
    assert (found.status, list(found.blocks)) == ("not run", [])
    assert found.lines()[0].startswith("block parity not run: the smallest block")
    assert found.command is not None


def test_wrong_weights_on_the_megatron_side_fail_and_are_placed(pair: Path, tmp_path: Path) -> None:
    """Bits that were right when they were compared, and are not those that Megatron reads."""
    write_checkpoint(toy_named("51b"), tmp_path / "other", seed=1)
    import_checkpoint(tmp_path / "other", tmp_path / "megatron")
    found = prove_blocks(pair / "hf", tmp_path / "megatron")
    assert found.status == "failed"
    assert found.places
    assert found.lines()[0].startswith("block parity failed")


def test_a_configuration_that_the_reference_does_not_take_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bits are proved; what transformers has against it is said, in one line."""

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no such\nrms_norm_eps")

    monkeypatch.setattr("transformers.AutoConfig.for_model", refuse)
    write_checkpoint(toy_named("nano-4b"), tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    found = cli_blocks.verify_blocks(tmp_path / "hf", tmp_path / "megatron", carry=())
    assert found.status == "not run"
    assert "transformers does not take this configuration" in found.summary
    assert "no such rms_norm_eps" in found.summary
    assert (list(found.blocks), found.num_parameters) == ([], 0)  # none was looked at


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("Llama-3.1-Nemotron-Nano-4B-v1.1", True), ("Llama-3.1-Nemotron-Nano-8B-v1", True),
        ("Llama-3.1-Nemotron-70B-Instruct-HF", True), (SUPER, False), (ULTRA, False),
    ],
)  # fmt: skip
def test_the_homogeneous_models_fit_the_budget_that_is_shipped(name: str, whole: bool) -> None:  # noqa: FBT001 - a parameter
    """And the others' smallest kinds do."""
    spec = read_spec(suites_dir() / "variants" / f"{name}.json")
    chosen, beyond = within(spec, read_config(published_config(name)), BUDGET)
    assert chosen
    assert whole == (not beyond)
    sizes = [block_num_parameters(spec, layer_idx) for layer_idx in chosen]
    assert sum(sizes) <= BUDGET
    assert all(max(sizes) <= block_num_parameters(spec, layer_idx) for layer_idx in beyond)


def test_where_it_cannot_be_done_the_reason_is_said(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A URL, a crew of torchrun's, a reference that cannot be built: never a traceback."""
    url = parse_location("memory://bucket/hf")
    found = cli_blocks.verify_blocks(url, pair / "megatron", carry=())
    assert (found.status, "files of this machine" in found.summary) == ("not run", True)
    shutil.copytree(pair / "megatron", tmp_path / "megatron")
    found = cli_blocks.verify_blocks(tmp_path / "gone", tmp_path / "megatron", carry=())
    assert (found.status, found.summary) == ("not run", "BR100 no configuration there")

    def broken(*_: object, **__: object) -> None:
        raise ValueError("no such model")

    monkeypatch.setattr("harness.block_parity.prove_blocks", broken)
    found = cli_blocks.verify_blocks(pair / "hf", pair / "megatron", carry=())
    assert (found.status, found.summary) == ("error", "ValueError: no such model")
    found = cli_blocks.verify_blocks(pair / "hf", pair / "megatron", carry=(), num_rounded=5)
    assert (found.status, found.summary[:25]) == ("not run", "rounding gave 5 elements ")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr("bridge.crew.launch.under_torchrun", lambda: True)
    assert "torchrun" in cli_blocks.verify_blocks(pair / "hf", pair / "megatron", carry=()).summary
