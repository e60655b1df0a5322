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
        self.num_rounded: list[int] = []

    def __call__(self, hf: Path, megatron: Path, *, carry: object, num_rounded: int) -> BlockParity:
        """Remember what was asked for."""
        del carry
        self.asked.append((hf, megatron))
        self.num_rounded.append(num_rounded)
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
    monkeypatch.setattr("bridge.cli_verification.block_verification", proof)
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    imported = run("import", "--hf-model", hf, "--megatron-path", megatron)
    assert imported.code == 0
    assert imported.out.splitlines()[-4:-1] == [
        "block parity passed: 2 kinds of blocks (0,2), 7 parameters; 0.9 <= 1.8",
        "left out: block 5, linear + no-op",
        "  nemotron-bridge verify ...",
    ]
    exported = run("export", "--megatron-path", megatron, "--hf-path", back, "--json")
    found = json.loads(exported.out)
    assert found["verified"] is True
    assert found["block_parity"]["left_out"] == {"5": "linear + no-op"}
    assert proof.asked == [(hf, megatron), (back, megatron)]


def test_the_peak_of_memory_is_that_of_all_that_was_done(
    run: Run, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof takes more than the conversion, whose own peak has been printed before it."""
    peaks = [1 << 30]

    def proof(*_: object, **__: object) -> BlockParity:
        peaks.append(50 << 30)
        return outcome("passed")

    monkeypatch.setattr("bridge.conversion_job.peak_rss", lambda: peaks[-1])
    monkeypatch.setattr("bridge.cli_verification.block_verification", proof)
    imported = run("import", "--hf-model", hf, "--megatron-path", tmp_path / "m")
    *rest, last = imported.out.splitlines()
    assert last == "peak memory with block parity 50.00 GiB"
    assert "50.00 GiB" not in "".join(rest)
    peaks.append(1 << 30)
    exported = run("export", "--megatron-path", tmp_path / "m", "--hf-path", tmp_path / "b",
                   "--json")  # fmt: skip
    assert json.loads(exported.out)["peak_rss"] == 50 << 30


@pytest.mark.parametrize("verify", ["bits", "none"])
def test_nothing_is_computed_where_bits_are_enough(
    run: Run, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: str
) -> None:
    """And JSON says nothing of it."""
    proof = Recorded(outcome("passed"))
    monkeypatch.setattr("bridge.cli_verification.block_verification", proof)
    done = run("import", "--hf-model", hf, "--megatron-path", tmp_path / "m", "--verify", verify,
               "--json")  # fmt: skip
    assert done.code == 0
    assert not proof.asked
    assert "block_parity" not in json.loads(done.out)


@pytest.mark.parametrize(("status", "code"), [("failed", 1), ("not run", 0), ("error", 3)])
def test_a_failure_is_exit_code_1_and_what_cannot_be_done_is_said(
    run: Run, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, code: int
) -> None:
    """The conversion is there in either case: its bits are right."""
    monkeypatch.setattr("bridge.cli_verification.block_verification", Recorded(outcome(status)))
    done = run("import", "--hf-model", hf, "--megatron-path", tmp_path / "m")
    assert done.code == code
    said = "could not be carried out" if status == "error" else status
    assert f"block parity {said}" in done.out
    assert (tmp_path / "m" / "latest_checkpointed_iteration.txt").exists()


def test_two_sides_that_rounding_made_differ_are_not_computed_with(
    run: Run, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The toy's values are not all float16's; its own dtype has them."""
    proof = Recorded(outcome("passed"))
    monkeypatch.setattr("bridge.cli_verification.block_verification", proof)
    for dtype in ("float16", "float32"):
        done = run("import", "--hf-model", hf, "--megatron-path", tmp_path / dtype, "--dtype",
                   dtype, "--json")  # fmt: skip
        rounding = json.loads(done.out)["rounding"] or {"changed": 0}
        assert proof.num_rounded[-1] == rounding["changed"]
    assert [rounded > 0 for rounded in proof.num_rounded] == [True, False]


def test_full_verification_is_refused_of_what_is_rounded_and_of_nothing_else(
    run: Run, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits differ by intent then, and nothing is written; a dtype that is there changes none."""
    asked: list[Path] = []
    monkeypatch.setattr(
        "bridge.cli_verification.full_verification", lambda hf, *_, **__: asked.append(hf)
    )
    megatron, back = tmp_path / "m", tmp_path / "back"
    kept, other = "float32", "bfloat16"
    importing: list[str | Path] = ["import", "--hf-model", hf, "--megatron-path", megatron]
    exporting: list[str | Path] = ["export", "--megatron-path", megatron, "--hf-path", back]
    for command, target in ((importing, megatron), (exporting, back)):
        done = run(*command, "--dtype", other, "--verify", "full")
        assert done.code == 2
        assert "--dtype makes them differ" in done.err
        assert not target.exists()
        assert run(*command, "--dtype", kept, "--verify", "full").code == 0
    assert asked == [hf, back]
