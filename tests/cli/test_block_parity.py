"""`--verify auto` on the command line: what is printed, what JSON says, and which exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness.block_parity import BlockParity
from harness.toys import toy_named, write_checkpoint

if TYPE_CHECKING:
    from tests.cli.conftest import Run


class Recorded:
    """Stands for the proof; `harness.block_parity`'s own tests run it."""

    def __init__(self, found: BlockParity) -> None:
        self.found = found
        self.asked: list[tuple[Path, Path]] = []

    def __call__(self, hf: Path, megatron: Path, *, carry: object) -> BlockParity:
        """Remember what was asked for."""
        del carry
        self.asked.append((hf, megatron))
        return self.found


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A toy's checkpoint."""
    write_checkpoint(toy_named("nano-4b"), tmp_path / "hf")
    return tmp_path / "hf"


def outcome(status: str) -> BlockParity:
    """With something left out."""
    return BlockParity(
        status=status, blocks=(0, 2), left_out={5: "linear + no-op"}, num_parameters=7,  # type: ignore[arg-type]  # a Status
        summary="0.9 <= 1.8", command="nemotron-bridge verify ...",
    )  # fmt: skip


def test_both_directions_compute_with_the_pair_they_have_made(
    run: Run, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the report; what was left out follows, with the command for it."""
    proof = Recorded(outcome("passed"))
    monkeypatch.setattr("bridge.cli.block_verification", proof)
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    imported = run("import", "--hf-model", hf, "--megatron-path", megatron)
    assert imported.code == 0
    assert imported.out.splitlines()[-3:] == [
        "block parity passed: 2 kinds of blocks (0,2), 7 parameters; 0.9 <= 1.8",
        "left out: block 5, linear + no-op",
        "  nemotron-bridge verify ...",
    ]
    exported = run("export", "--megatron-path", megatron, "--hf-path", back, "--json")
    found = json.loads(exported.out)
    assert found["verified"] is True
    assert found["block_parity"]["left_out"] == {"5": "linear + no-op"}
    assert proof.asked == [(hf, megatron), (back, megatron)]


@pytest.mark.parametrize("verify", ["bits", "none"])
def test_nothing_is_computed_where_bits_are_enough(
    run: Run, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: str
) -> None:
    """And JSON says nothing of it."""
    proof = Recorded(outcome("passed"))
    monkeypatch.setattr("bridge.cli.block_verification", proof)
    done = run("import", "--hf-model", hf, "--megatron-path", tmp_path / "m", "--verify", verify,
               "--json")  # fmt: skip
    assert done.code == 0
    assert not proof.asked
    assert "block_parity" not in json.loads(done.out)


@pytest.mark.parametrize(("status", "code"), [("failed", 1), ("not run", 0)])
def test_a_failure_is_exit_code_1_and_what_cannot_be_done_is_said(
    run: Run, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, code: int
) -> None:
    """The conversion is there in either case: its bits are right."""
    monkeypatch.setattr("bridge.cli.block_verification", Recorded(outcome(status)))
    done = run("import", "--hf-model", hf, "--megatron-path", tmp_path / "m")
    assert done.code == code
    assert f"block parity {status}" in done.out
    assert (tmp_path / "m" / "latest_checkpointed_iteration.txt").exists()
