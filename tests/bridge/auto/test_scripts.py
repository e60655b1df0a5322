"""Scripts written for Megatron-Bridge run here once their import says `bridge`.

Each is one of `docs/migration.md`, run as a user would: by `python` or by torchrun, without a
`__main__` guard, in an empty directory.
"""

from __future__ import annotations

import filecmp
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from safetensors.torch import load_file

from bridge import AutoBridge
from bridge.convert import export_checkpoint, import_checkpoint
from bridge.storage.target import MANIFEST_NAME
from harness.toys import toy_named, write_checkpoint

pytestmark = pytest.mark.ranks

Script: TypeAlias = Callable[..., str]
StartHub: TypeAlias = Callable[..., Any]
"""That of `conftest`, which no test can import."""

ROOT = Path(__file__).parents[3]
HUB_ID = "nvidia/Llama-3_3-Nemotron-Super-49B-v1"
SCRIPTS = dict(
    re.findall(
        r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```",
        (ROOT / "docs" / "migration.md").read_text(encoding="utf-8"),
        flags=re.MULTILINE | re.DOTALL,
    )
)
"""The page's scripts by their headings."""
HELD = """
import json
import os
from pathlib import Path

held = {name: list(shard.shape) for part in model for name, shard in part.named_parameters()}
Path(f"rank{os.environ['RANK']}.json").write_text(json.dumps(held))
"""
"""Follows a script whose ranks have a `model`: what each holds, in a file of its own."""
PROMPT = [3, 141, 59, 26, 5]
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with no-ops and several widths."""
    directory = tmp_path_factory.mktemp("models") / "super"
    write_checkpoint(toy_named("super-49b-v1"), directory, dtype="float32")
    return directory


def same_files(left: Path, right: Path) -> bool:
    """Whether two flat directories hold the same bytes, but for a conversion's manifest."""
    names = {path.name for path in (*left.iterdir(), *right.iterdir())} - {MANIFEST_NAME}
    return filecmp.cmpfiles(left, right, names, shallow=False)[1:] == ([], [])


def greedy(directory: Path) -> list[int]:
    """What transformers' model says next, token by token, without a cache."""
    from transformers import AutoModelForCausalLM

    import bridge.decilm  # noqa: F401 - registers the model type

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            following = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, following], dim=1)
    return tokens[0].tolist()


def slices() -> dict[str, list[int]]:
    """What each of two TP ranks holds of `model`: half of all rows, heads and widths; norms whole.

    The vocabulary's 523 rows are padded to 524.
    """
    found = {
        "embedding.word_embeddings.weight": [262, 128],
        "output_layer.weight": [262, 128],
        "decoder.final_layernorm.weight": [128],
    }
    for layer_idx, half in enumerate((256, 640, 128, 384, 256, 128, 128, 256)):
        layer = f"decoder.layers.{layer_idx}"
        found[f"{layer}.pre_mlp_layernorm.weight"] = [128]
        found[f"{layer}.mlp.linear_fc1.weight"] = [half + half, 128]
        found[f"{layer}.mlp.linear_fc2.weight"] = [128, half]
    for layer_idx in (0, 1, 3, 6, 7):  # the others have no attention
        layer = f"decoder.layers.{layer_idx}"
        found[f"{layer}.input_layernorm.weight"] = [128]
        found[f"{layer}.self_attention.linear_qkv.weight"] = [64 + 8 + 8, 128]
        found[f"{layer}.self_attention.linear_proj.weight"] = [128, 64]
    return found


def test_a_model_is_loaded_over_two_tensor_parallel_ranks(
    model: Path, tmp_path: Path, script: Script, hub: StartHub
) -> None:
    """By torchrun, which the provider joins by itself; streamed to every rank, and saved again."""
    environment = hub(model, HUB_ID).environment
    out = script(SCRIPTS["Load, on any layout"] + HELD, ranks=2, **environment)
    streamed = out.splitlines()
    whole = sorted(
        f"{name} {tuple(tensor.shape)} {tensor.dtype}"
        for file in model.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    )
    assert sorted(streamed[: len(whole)]) == sorted(streamed[len(whole) :]) == whole
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == slices()
    assert same_files(model, tmp_path / "hf_exports" / "super-49b")
    export_checkpoint(tmp_path / "checkpoints" / "super-49b", tmp_path / "back")
    assert same_files(model, tmp_path / "back")


def test_a_model_of_the_hub_is_imported_exported_and_generates(
    model: Path, tmp_path: Path, script: Script, hub: StartHub
) -> None:
    """Each file is fetched once; greedy decoding is that of transformers' model."""
    started = hub(model, HUB_ID)
    code = SCRIPTS["Import and export"] + SCRIPTS["Generate"]
    code += f"print(AutoBridge.get_hf_model_id_from_checkpoint('./checkpoints/x') == {HUB_ID!r})"
    assert script(code, **started.environment) == f"{greedy(model)}\nTrue\n"
    assert same_files(model, tmp_path / "hf_exports" / "x")
    assert sorted(started.transferred) == sorted(path.name for path in model.iterdir())


def test_an_export_of_a_training_run_downloads_no_weights(
    model: Path, tmp_path: Path, hub: StartHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an iteration that no import has left its record beside."""
    started = hub(model, HUB_ID)
    started.be_the_hub(monkeypatch, tmp_path / "cache")
    import_checkpoint(model, tmp_path / "imported")
    (tmp_path / "run").mkdir()
    iteration = tmp_path / "run" / "iter_0000500"
    (tmp_path / "imported" / "iter_0000000").rename(iteration)
    AutoBridge.from_hf_pretrained(HUB_ID).export_ckpt(
        megatron_path=iteration, hf_path=tmp_path / "hf"
    )
    assert [name for name in started.transferred if "safetensors" in name] == []
    side = sorted(path.name for path in model.iterdir() if "safetensors" not in path.name)
    assert filecmp.cmpfiles(model, tmp_path / "hf", side, shallow=False)[0] == side
    # Our own cut into files, for the source's is in the weights that were not downloaded.
    assert tensors(tmp_path / "hf") == tensors(model)


def tensors(directory: Path) -> dict[str, bytes]:
    """What safetensors itself reads, float32 bit by bit."""
    return {
        name: tensor.numpy().tobytes()
        for file in directory.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
