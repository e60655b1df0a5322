"""A GPU's figures name its driver and its CUDA; without one there is nothing to name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.benchmarks.machine import gpu_versions


def test_without_a_gpu_there_are_no_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch was built with."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert gpu_versions() == {"gpu_driver": None, "cuda": None}


@pytest.mark.parametrize(
    ("script", "driver"),
    [
        ("echo 580.159.04; echo 580.159.04", "580.159.04"),
        ("echo it has failed; exit 9", None),
        ("true", None),
    ],
)
def test_the_driver_is_what_its_tool_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, driver: str | None
) -> None:
    """Once, however many GPUs there are; a tool that fails says nothing."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu_versions() == {"gpu_driver": driver, "cuda": "13.0"}


def test_a_driver_without_its_tool_has_no_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And the run goes on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_versions()["gpu_driver"] is None
