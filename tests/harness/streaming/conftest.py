"""What tests of streaming share: a process that Megatron-Core may take for its only rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.bench import Subject
from harness.hooks import HEALTHY, Fault
from harness.streaming.bench import StreamingBench
from harness.streaming.walking import Streaming
from harness.suite import Case
from harness.toys import toy_named, write_checkpoint

MakeBench = Callable[..., StreamingBench]


@pytest.fixture(autouse=True)
def restore_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what `bridge.platform` changes of torch and of the environment for the CPU."""
    for name in ("current_device", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(torch.cuda, name))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Toys on disk in float32, by name, each written once."""
    root = tmp_path_factory.mktemp("toys")

    def written(name: str) -> Path:
        if not (root / name).exists():
            write_checkpoint(toy_named(name), root / name)
        return root / name

    return written


@pytest.fixture
def make_bench(tmp_path: Path) -> MakeBench:
    """A streaming bench for one model, called `m`."""

    def make(
        hf: Path, *, budget: int = 1 << 30, fault: Fault = HEALTHY, keep: Path | None = None,
        resume: bool = False, threads: int | None = None, **subject: Any,  # noqa: ANN401 - Subject's
    ) -> StreamingBench:  # fmt: skip
        streaming = Streaming(
            memory_budget=budget, keep=keep, resume=resume, threads=threads, quiet=True
        )
        subjects = {"m": Subject(name="m", hf=hf, **subject)}
        return StreamingBench(tmp_path, subjects=subjects, fault=fault, streaming=streaming)

    return make


def case_of(
    check: str = "blocks", *, probe: str = "long", dtype: str = "float32", device: str = "cpu"
) -> Case:
    """A case on the model of `make_bench`."""
    return Case(check=check, model="m", dtype=dtype, layout="tp1-pp1", probe=probe, device=device)
