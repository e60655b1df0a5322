"""The real Megatron-Bridge reads what an import writes, and an export reads what it writes.

`nox -s peer` installs it, from the package index, in an environment of its own: it needs another
transformers than this project. A vocabulary of whole 128s: its export does not take padding away.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bridge.convert import export_checkpoint, import_checkpoint
from harness.replay import write_model
from harness.toys import toy_named, write_checkpoint

pytestmark = pytest.mark.peer

SCRIPT = Path(__file__).parent / "megatron_bridge_on_cpu.py"


def upstream(*arguments: str | Path) -> None:
    """Run the script; what it said is in the failure."""
    environment = {name: one for name, one in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(  # noqa: S603 - the script beside this file
        [environment["NEMOTRON_BRIDGE_PEER_PYTHON"], SCRIPT, *arguments],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def weights(directory: Path) -> Mapping[str, torch.Tensor]:
    """Every tensor of a Hugging Face directory."""
    return {
        name: tensor
        for path in directory.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def assert_same_bits(found: Path, wanted: Path) -> None:
    """Names, dtypes and every bit."""
    ours, theirs = weights(found), weights(wanted)
    assert ours.keys() == theirs.keys()
    assert [
        name
        for name in theirs
        if ours[name].dtype != theirs[name].dtype or not torch.equal(ours[name], theirs[name])
    ] == []


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a Llama with Nano-8B's traits."""
    toy, root = toy_named("nano-8b"), tmp_path_factory.mktemp("peer")
    found = write_model({**toy.config, "vocab_size": 640}, root / "hf", seed=0)
    write_checkpoint(toy, root / "toy")
    for path in (root / "toy").glob("*token*"):  # without a tokenizer it exports nothing
        shutil.copy(path, found)
    return found


@pytest.fixture(scope="module")
def megatron(hf: Path) -> Path:
    """Our import of it."""
    path = hf.parent / "megatron"
    import_checkpoint(hf, path)
    return path


def test_its_export_of_our_import_has_the_sources_bits(
    hf: Path, megatron: Path, tmp_path: Path
) -> None:
    """It builds the model from our `run_config.yaml` and loads it strictly."""
    upstream("export", megatron, hf, tmp_path / "out")
    assert_same_bits(tmp_path / "out", hf)


def test_our_export_of_what_it_saved_again_has_the_sources_bits(
    hf: Path, megatron: Path, tmp_path: Path
) -> None:
    """Loaded by it, saved by it."""
    upstream("resave", megatron / "iter_0000000", tmp_path / "again")
    export_checkpoint(tmp_path / "again", tmp_path / "out", hf_model=hf)
    assert_same_bits(tmp_path / "out", hf)


def test_our_export_of_its_import_has_the_sources_bits(hf: Path, tmp_path: Path) -> None:
    """Its own way in, our way out."""
    upstream("import", hf, tmp_path / "theirs")
    export_checkpoint(tmp_path / "theirs", tmp_path / "out", hf_model=hf)
    assert_same_bits(tmp_path / "out", hf)
