"""A toy on disk is what transformers and safetensors take for a real checkpoint."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

from bridge.errors import CheckpointError, DtypeMismatchError, TargetExistsError
from harness.oracle import forward
from harness.probes import long_probe
from harness.toys import TOYS, side_files, write_checkpoint


def _index(directory: Path) -> tuple[dict[str, str], int]:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return index["weight_map"], index["metadata"]["total_size"]


@pytest.mark.parametrize("name", ["nano-4b", "tied"])
def test_transformers_loads_it_and_computes_what_the_oracle_does(tmp_path: Path, name: str) -> None:
    """`from_pretrained` takes the directory; its logits at long positions are the oracle's."""
    toy = TOYS[name]
    write_checkpoint(toy, tmp_path / "toy", seed=5)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "toy", dtype=torch.float32).eval()
    probe = long_probe(toy.config["vocab_size"])
    with torch.no_grad():
        found = model(
            torch.from_numpy(probe.input_ids),
            position_ids=torch.from_numpy(probe.position_ids)[None],
        ).logits.numpy()
    truth = forward(toy.config, toy.weight(5), probe.input_ids, probe.position_ids)
    assert np.sqrt(np.mean((found - truth) ** 2) / np.mean(truth**2)) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TOYS)
def test_shards_hold_every_tensor_once_with_the_stream_s_bits(
    tmp_path: Path, name: str, dtype: str
) -> None:
    """Index and shards agree with each other, with the architecture and with the stream."""
    toy = TOYS[name]
    write_checkpoint(toy, tmp_path, dtype=dtype, seed=5)
    weight_map, total = _index(tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) >= 3
    assert sorted(set(weight_map.values())) == files
    expected = dict(toy.weights(5, dtype=dtype))
    assert expected.keys() == weight_map.keys()
    seen = 0
    for file in files:
        with safe_open(tmp_path / file, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert set(shard.keys()) == {key for key, home in weight_map.items() if home == file}
            for key in shard.keys():  # noqa: SIM118  # safe_open is not iterable
                tensor = shard.get_tensor(key)
                assert tensor.dtype == getattr(torch, dtype)
                np.testing.assert_array_equal(tensor.float().numpy(), expected[key])
                seen += tensor.nbytes
    assert seen == total


def test_a_tied_checkpoint_stores_the_embedding_once(tmp_path: Path) -> None:
    """There is no `lm_head.weight`, as transformers saves it."""
    write_checkpoint(TOYS["tied"], tmp_path)
    assert "lm_head.weight" not in _index(tmp_path)[0]
    assert "model.embed_tokens.weight" in _index(tmp_path)[0]


def test_max_shard_size_bounds_every_shard_of_several_tensors(tmp_path: Path) -> None:
    """Shards stay within the size, but for a tensor that alone exceeds it."""
    write_checkpoint(TOYS["ultra-253b"], tmp_path, max_shard_size=2_000_000)
    weight_map, _ = _index(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        alone = list(weight_map.values()).count(path.name) == 1
        assert alone or path.stat().st_size < 2_000_000 + 8192


def test_one_shard_has_the_plain_name_and_no_index(tmp_path: Path) -> None:
    """As transformers writes a model that fits one file."""
    write_checkpoint(TOYS["nano-4b"], tmp_path, max_shard_size=10**9)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]


def test_the_configuration_names_the_dtype_it_was_written_in(tmp_path: Path) -> None:
    """Under whichever key its style has; nothing else differs from the toy's."""
    for name, key in (("nano-4b", "torch_dtype"), ("tied", "dtype")):
        write_checkpoint(TOYS[name], tmp_path / name, dtype="float32")
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert written == TOYS[name].config | {key: "float32"}


def test_side_files_are_valid_and_no_json_library_writes_them_so(tmp_path: Path) -> None:
    """Their readers take them; parsing and dumping any of the odd ones changes its bytes."""
    toy = TOYS["nano-4b"]
    write_checkpoint(toy, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("w3 w514")["input_ids"] == [3, 514]
    assert tokenizer.eos_token_id == 509
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [509, 511, 512]
    for name, content in side_files(toy).items():
        assert (tmp_path / name).read_bytes() == content
        if name != "tokenizer.json":
            for indent in (None, 1, 2, 4):
                for ascii_only in (True, False):
                    text = json.dumps(json.loads(content), indent=indent, ensure_ascii=ascii_only)
                    assert content.strip() != text.encode()


def test_a_directory_that_holds_something_is_refused(tmp_path: Path) -> None:
    """Nothing is overwritten."""
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(TargetExistsError):
        write_checkpoint(TOYS["nano-4b"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_a_dtype_the_stream_does_not_define_is_refused(tmp_path: Path) -> None:
    """float16 toys do not exist."""
    with pytest.raises(DtypeMismatchError):
        write_checkpoint(TOYS["nano-4b"], tmp_path / "new", dtype="float16")


@pytest.mark.parametrize("allowed", [0, 500, 5000])
def test_where_the_disk_is_full_nothing_is_left(tmp_path: Path, allowed: int) -> None:
    """One error, whether the first file or a shard does not fit; and no directory."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, limits[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            write_checkpoint(TOYS["nano-4b"], tmp_path / "toy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.code == "BR300"
    assert not list(tmp_path.iterdir())


def test_a_toy_replaces_a_checkpoint_only_when_told_to(tmp_path: Path) -> None:
    """And one of another seed takes its place."""
    write_checkpoint(TOYS["nano-4b"], tmp_path / "toy", seed=1)
    shard = next((tmp_path / "toy").glob("*.safetensors"))
    before = shard.read_bytes()
    with pytest.raises(TargetExistsError):
        write_checkpoint(TOYS["nano-4b"], tmp_path / "toy", seed=2)
    assert shard.read_bytes() == before
    write_checkpoint(TOYS["nano-4b"], tmp_path / "toy", seed=2, overwrite=True)
    assert shard.read_bytes() != before
