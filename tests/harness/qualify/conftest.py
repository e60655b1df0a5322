"""One bundle of a small model that is no toy, made by the command itself, for all tests here."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import harness.cli  # noqa: F401 - it adds the commands
from bridge.cli import app
from bridge.spec import (
    BlockSpec,
    GroupedQueryAttention,
    Llama3Scaling,
    ModelSpec,
    RopeSpec,
    SwiGLU,
)
from harness.bench import Bench, Subject
from harness.config_forms import write_config
from harness.launcher import RankPool

ODD = ModelSpec(
    hidden_size=36,
    num_attention_heads=3,
    kv_channels=16,
    vocab_size=301,
    max_position_embeddings=65536,
    layernorm_epsilon=1e-6,
    rope=RopeSpec(
        rotary_base=250000.0,
        scaling=Llama3Scaling(
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=4096,
        ),
    ),
    share_embeddings_and_output_weights=False,
    params_dtype="bfloat16",
    blocks=(
        BlockSpec(
            attention=GroupedQueryAttention(num_query_groups=1), ffn=SwiGLU(ffn_hidden_size=52)
        ),
    ),
    heterogeneous_block_specs=True,
)
"""Three heads and one block: a single rank is all that it can be cut into, so it is quick."""
FAULTS = ("gate-up-swapped", "rope-theta")
"""Of which a trial is made."""


class Lent:
    """A pool that whoever was given it cannot close: ranks are started once."""

    def __init__(self, pool: RankPool) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - RankPool's
        return getattr(self._pool, name)

    def close(self) -> None:
        """Leave it open."""


def here(root: Path) -> Any:  # noqa: ANN401 - as `over_benches`
    """`over_benches` in this process."""

    def over_benches(
        function: Any,  # noqa: ANN401 - the matrix's
        arguments: Sequence[tuple[Any, ...]],
        *,
        timeout: float,
        subjects: dict[str, Subject],
        workers: int | None = None,
    ) -> Iterator[tuple[int, Any]]:
        del workers
        root.mkdir(exist_ok=True)
        with Bench(root, subjects=subjects, timeout=timeout) as bench:
            for number, one in enumerate(arguments):
                yield number, function(bench, *one)

    return over_benches


@pytest.fixture(scope="session")
def odd_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its configuration, alone."""
    path = tmp_path_factory.mktemp("odd") / "odd.json"
    config = write_config(ODD, schema="2025-11", rope_style="transformers-5", state_head_dim=True)
    path.write_text(json.dumps(config, indent=1), "utf-8")
    return path


@pytest.fixture(scope="session")
def finished(odd_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, which no test changes."""
    root = tmp_path_factory.mktemp("qualified")
    arguments = ["qualify", "--config", str(odd_config), "--report", str(root / "bundle"), "--json"]
    arguments += [word for name in FAULTS for word in ("--faults", name)]
    with pytest.MonkeyPatch.context() as patch, RankPool(device="cpu", timeout=120) as pool:
        for name in ("current_device", "synchronize"):  # `bridge.platform` changes them on a CPU
            patch.setattr(torch.cuda, name, getattr(torch.cuda, name))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setattr("harness.workbench.RankPool", lambda **_: Lent(pool))
        patch.setattr("harness.faults.matrix.over_benches", here(root / "work"))
        patch.setattr(sys, "argv", ["nemotron-bridge", *arguments])
        done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 3, done.output  # a trial of few faults is not whole
    return root / "bundle"


@pytest.fixture
def bundle(finished: Path, tmp_path: Path) -> Path:
    """A bundle of one's own."""
    return Path(shutil.copytree(finished, tmp_path / "bundle"))
