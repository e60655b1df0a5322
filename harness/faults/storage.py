"""Damaged files: what disks, copies, half-finished jobs and helpful editors do to a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from bridge.dtypes import Words
from bridge.hf_config import load_hf_config, spec_from_hf_config
from bridge.plan import Plan
from bridge.spec import GroupedQueryAttention, ModelSpec
from bridge.storage.megatron import MegatronSource
from bridge.tiling import Box
from harness.faults import traits
from harness.faults.seams import Replaced, Together
from harness.hooks import Fault

Function = Callable[..., Any]


def read_rows(checkpoint: Path, name: str) -> Words:
    """A parameter of a Megatron checkpoint, whole."""
    with MegatronSource(checkpoint) as source:
        info = source.tensors[name]
        words: Words = np.empty(info.shape, info.dtype.word)
        source.read_into(name, Box.whole(info.shape), words)
    return words


def write_rows(checkpoint: Path, name: str, words: Words) -> None:
    """Put other rows in the place of a parameter's, in the file and nowhere else."""
    with MegatronSource(checkpoint) as source:
        key, layer_idx = source._stored[name]  # noqa: SLF001 - what no user of the bridge may do
        for row in range(words.shape[0]):
            box = Box.rows(row, row + 1, words.shape[1:])
            if layer_idx is not None:
                box = Box((layer_idx, *box.starts), (layer_idx + 1, *box.stops))
            extents = source._reader.extents(key, box)  # noqa: SLF001 - as above
            if extents is None or len(extents) != 1:  # cut by columns: another layout's file
                continue
            extent = extents[0]
            with extent.path.open("r+b") as file:
                file.seek(extent.offset)
                file.write(words[row].tobytes())


def _spec(checkpoint: Path) -> ModelSpec:
    return spec_from_hf_config(load_hf_config(checkpoint / "hf_source"))


def _names(checkpoint: Path, suffix: str) -> list[str]:
    with MegatronSource(checkpoint) as source:
        return [name for name in source.tensors if name.endswith(suffix)]


def swap_keys(checkpoint: Path) -> None:
    """The K heads of the first two query groups of a block, exchanged in the file."""
    spec = _spec(checkpoint)
    for layer_idx, block in enumerate(spec.blocks):
        attention = block.attention
        if not isinstance(attention, GroupedQueryAttention) or attention.num_query_groups < 2:
            continue
        name = f"decoder.layers.{layer_idx}.self_attention.linear_qkv.weight"
        words, size = read_rows(checkpoint, name), spec.kv_channels
        per_group = (spec.num_attention_heads // attention.num_query_groups + 2) * size
        first = per_group - 2 * size
        one, other = slice(first, first + size), slice(first + per_group, first + per_group + size)
        words[one], words[other] = words[other].copy(), words[one].copy()
        write_rows(checkpoint, name, words)
        return


def scale_norm(checkpoint: Path) -> None:
    """One norm times 1.001."""
    name = _names(checkpoint, "final_layernorm.weight")[0]
    words = read_rows(checkpoint, name)
    write_rows(checkpoint, name, (words.view(np.float32) * np.float32(1.001)).view(words.dtype))


def fill_padding(checkpoint: Path) -> None:
    """Rows that pad the vocabulary hold what no token has."""
    spec = _spec(checkpoint)
    name = "embedding.word_embeddings.weight"
    words = read_rows(checkpoint, name)
    words[spec.vocab_size :] = words[0]
    write_rows(checkpoint, name, words)


def flip_bit(folder: str, pattern: str, checkpoint: Path) -> None:
    """The lowest bit of a byte in the middle of the largest weight file."""
    path = max(checkpoint.glob(f"{folder}{pattern}"), key=lambda one: one.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(pattern: str, checkpoint: Path) -> None:
    """A copy that ended early."""
    path = max(checkpoint.glob(pattern), key=lambda one: one.stat().st_size)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1000)


def lose(pattern: str, checkpoint: Path) -> None:
    """A file that was not copied."""
    max(checkpoint.glob(pattern)).unlink()


def exchange(pattern: str, checkpoint: Path) -> None:
    """Two files under each other's names."""
    found = sorted(checkpoint.glob(pattern))
    if len(found) > 1:
        spare = found[0].with_suffix(".spare")
        found[0].rename(spare)
        found[1].rename(found[0])
        spare.rename(found[1])


def stale_tracker(checkpoint: Path) -> None:
    """The tracker names an iteration that is not there."""
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("7")


def stale_index(directory: Path) -> None:
    """An index of another sharding."""
    path = directory / "model.safetensors.index.json"
    if path.exists():
        index = json.loads(path.read_text("utf-8"))
        files = sorted(set(index["weight_map"].values()))
        name = next(iter(index["weight_map"]))
        index["weight_map"][name] = next(f for f in files if f != index["weight_map"][name])
        path.write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def tidy_json(directory: Path) -> None:
    """An editor that re-indents JSON on saving."""
    for path in directory.glob("*token*.json"):
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")), indent=2), "utf-8")


def newer_config(directory: Path) -> None:
    """`config.json` saved again by transformers 5: `rope_parameters`, no `rope_theta`."""
    path = directory / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["rope_parameters"] = (config.pop("rope_scaling", None) or {}) | {
        "rope_theta": config.pop("rope_theta", 10000.0)
    }
    path.write_text(json.dumps(config, indent=2), "utf-8")


def rounded_twice(healthy: Function) -> Function:
    """Weights that go through bfloat16 on their way."""

    def bands(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - arrays
        for words in healthy(*args, **kwargs):
            yield words & np.uint32(0xFFFF0000) if words.dtype == np.uint32 else words

    return bands


def by_buffers(_healthy: Function) -> Function:
    """No file is copied by the system: every element passes through the bridge's own buffers."""

    def no_ranges(*_args: Any, **_kwargs: Any) -> None:  # noqa: ANN401 - the function's own
        return None

    return no_ranges


def labelled_float64(healthy: Function) -> Function:
    """float32 weights under the label of another dtype of that size."""

    def dtypes(self: Plan, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - dtypes
        from bridge.dtypes import dtype_named

        found = healthy(self, *args, **kwargs)
        return dict.fromkeys(found, dtype_named("float64"))

    return dtypes


def without_objects(healthy: Function) -> Function:
    """No `_extra_state` beside the linears."""

    def layout(chunks: Any, _objects: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the function's own
        return healthy(chunks, {}, **kwargs)

    return layout


def transposed(healthy: Function) -> Function:
    """Square matrices read with rows for columns."""

    def read(self: Any, name: str, box: Box, out: Words) -> None:  # noqa: ANN401 - a source
        shape = self.tensors[name].shape
        chosen = name.endswith(("o_proj.weight", "linear_attn.weight", "linear_mlp.weight"))
        if not chosen or len(shape) != 2 or shape[0] != shape[1]:
            healthy(self, name, box, out)
            return
        turned = np.empty(box.shape[::-1], out.dtype)
        healthy(self, name, Box(box.starts[::-1], box.stops[::-1]), turned)
        out[...] = turned.T

    return read


_storage = partial(Fault, family="storage")
_DISTCP: Final = "iter_*/*.distcp"
_SHARDS: Final = "*.safetensors"

FAULTS: Final = (
    _storage(name="file-keys-swapped", stands_for="an off-by-one over groups in somebody's script",
             applies=traits.has_groups, checkpoint=swap_keys),
    _storage(name="file-norm-scaled", stands_for="a norm that was merged by hand",
             checkpoint=scale_norm),
    _storage(name="file-padding-filled", stands_for="padding rows initialised with the mean row",
             applies=traits.has_padding, checkpoint=fill_padding),
    _storage(name="file-bit-flipped", stands_for="a bit that flipped on the disk",
             checkpoint=partial(flip_bit, "iter_*/", "*.distcp")),
    _storage(name="file-truncated", stands_for="a copy that ran out of disk",
             checkpoint=partial(truncate, _DISTCP)),
    _storage(name="file-lost", stands_for="a shard that was not copied",
             checkpoint=partial(lose, _DISTCP)),
    _storage(name="files-exchanged", stands_for="two ranks' files under each other's names",
             needs=("tp", "pp"), checkpoint=partial(exchange, _DISTCP)),
    _storage(name="tracker-stale", stands_for="a tracker of a deleted iteration",
             checkpoint=stale_tracker),
    _storage(name="extra-state-dropped", stands_for="a writer that stores tensors alone",
             code=Replaced("bridge.storage.megatron", "layout_checkpoint", without_objects)),
    _storage(name="rounded-through-bfloat16", stands_for="a loader whose default dtype is bf16",
             code=Together((Replaced("bridge.reading", "byte_ranges", by_buffers),
                            Replaced("bridge.reading", "read_bands", rounded_twice)))),
    _storage(name="dtype-label", stands_for="a header that says another dtype",
             code=Replaced("bridge.plan", "Plan.target_dtypes", labelled_float64)),
    _storage(name="square-transposed", stands_for="Conv1D weights, (in, out), taken for Linear's",
             applies=traits.has_transposable,
             code=Together((Replaced("bridge.reading", "byte_ranges", by_buffers),
                            Replaced("bridge.storage.safetensors", "SafetensorsSource.read_into",
                                     transposed)))),
    _storage(name="export-bit-flipped", stands_for="a bit that flipped on the way out",
             exported=partial(flip_bit, "", _SHARDS)),
    _storage(name="export-truncated", stands_for="an upload that ended early",
             exported=partial(truncate, _SHARDS)),
    _storage(name="export-shards-exchanged", stands_for="two shards under each other's names",
             exported=partial(exchange, _SHARDS)),
    _storage(name="export-shard-lost", stands_for="a shard that was not uploaded",
             exported=partial(lose, _SHARDS)),
    _storage(name="export-index-stale", stands_for="an index kept from another sharding",
             exported=stale_index),
    _storage(name="export-json-tidied", stands_for="side files re-encoded on the way",
             exported=tidy_json),
    _storage(name="export-config-newer", stands_for="config.json saved again by transformers 5",
             exported=newer_config),
)  # fmt: skip
