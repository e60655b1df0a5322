"""A toy on disk: a Hugging Face checkpoint directory with everything a real one has."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

import numpy as np

from bridge.dtypes import dtype_named
from bridge.errors import CheckpointError
from bridge.storage.building import new_directory
from harness.toys.model import Toy

_SHARDS: Final = 4
"""Shards aimed at when no size is given."""


def write_checkpoint(
    toy: Toy,
    directory: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    max_shard_size: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write configuration, weights in several shards with their index, and side files.

    Args:
        toy: The model.
        directory: Created; must not exist or be empty, unless it is to be overwritten.
        dtype: `float32` or `bfloat16`; also what `config.json` then says.
        seed: Of the weights.
        max_shard_size: Bytes of tensors in a shard; a larger tensor has one of its own. By default
            what gives about four shards.
        overwrite: Replace a checkpoint that is there.

    Raises:
        TargetExistsError: BR304, the directory holds something that is not to be replaced.
        CheckpointError: BR300, the system refuses; nothing is left then.
        DtypeMismatchError: BR303, weights cannot be drawn in this dtype.
    """
    from safetensors import SafetensorError

    with new_directory(directory, overwrite=overwrite) as new:
        try:
            _fill(toy, new, dtype=dtype, seed=seed, max_shard_size=max_shard_size)
        except SafetensorError as error:  # as which it tells of a full disk
            raise CheckpointError(f"cannot write weights: {error}", where=str(directory)) from None


def _fill(toy: Toy, directory: Path, *, dtype: str, seed: int, max_shard_size: int | None) -> None:
    config = toy.config_for(dtype)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, content in side_files(toy).items():
        (directory / name).write_bytes(content)

    itemsize = dtype_named(dtype).itemsize
    sizes = {name: math.prod(shape) * itemsize for name, shape in toy.tensors().items()}
    total = sum(sizes.values())
    shards = _shards(sizes, max_shard_size or -(-total // _SHARDS))
    files: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(toy, names, directory / file, dtype=dtype, seed=seed)
        files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        path = directory / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(sizes: dict[str, int], max_shard_size: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_shard_size:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _write_shard(toy: Toy, names: list[str], path: Path, *, dtype: str, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    element = getattr(torch, dtype)
    tensors = {}
    for name in names:
        words = toy.words(name, seed=seed, dtype=dtype)
        signed = words.view(np.dtype(f"i{words.itemsize}"))  # torch has no unsigned words
        tensors[name] = torch.from_numpy(signed).view(element)
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors lets nobody else read it


def side_files(toy: Toy) -> dict[str, bytes]:
    """Files that a conversion carries, by name.

    They are valid for their readers, and no JSON library would write these bytes: CRLF, trailing
    blanks, escapes beside raw UTF-8, no final newline. So re-encoding one shows.
    """
    vocab_size = toy.config["vocab_size"]
    bos, ends = toy.config.get("bos_token_id") or 0, toy.config.get("eos_token_id") or 0
    ends = ends if isinstance(ends, list) else [ends]
    words = {f"w{token}": token for token in range(vocab_size)}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }
    settings = (
        "{\r\n"
        '\t"tokenizer_class": "PreTrainedTokenizerFast",  \r\n'
        f'\t"bos_token": "w{bos}",\r\n\t"eos_token": "w{ends[0]}",\r\n'
        '\t"clean_up_tokenization_spaces" : false,\r\n'
        '\t"note": "N\\u00e9motron \u2192 \u00e9"\r\n'
        "}"
    )
    special = f'{{ "eos_token":"w{ends[0]}",\n\n"bos_token":"w{bos}" }}\n \n'
    generation = (
        f'{{"bos_token_id": {bos}, "eos_token_id": {ends},\n'
        '  "do_sample": true, "temperature": 6.0e-1, "top_p": 0.950,\n'
        '  "transformers_version": "4.48.3"}\n\n'
    )
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False, indent=1).encode(),
        "tokenizer_config.json": settings.encode(),
        "special_tokens_map.json": special.encode(),
        "generation_config.json": generation.encode(),
    }
