"""A checkpoint of any size that nobody stored: every tensor from (seed, name), piece by piece.

The stream is `philox`'s, so the bytes are the same on every machine and no piece needs the ones
before it. It stands in for published weights where those are not at hand, and makes test
checkpoints of real dimensions.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from bridge.crew.agreement import agree
from bridge.crew.protocol import Alone, Crew
from bridge.crew.sharing import share_of, shared_checkpoint
from bridge.dtypes import Words, dtype_named
from bridge.errors import named_refusals
from bridge.hf_config import CONFIG_NAME, config_file, load_hf_config, spec_from_hf_config
from bridge.parameters import hf_tensors
from bridge.progress import Progress, Silent
from bridge.spec import ModelSpec
from bridge.storage.journal import clear_up, is_complete, job_of
from bridge.storage.philox import fill_words, mean_and_std
from bridge.storage.remote import Location
from bridge.storage.safetensors import INDEX_NAME
from bridge.storage.safetensors_layout import layout_shards, total_nbytes
from bridge.storage.source import TensorInfo
from bridge.storage.target import read_small_file, refuse_overlap
from bridge.tiling import Box, Tiling
from bridge.transfer import TransferLimits


class SyntheticSource:
    """Pseudo-random weights for every HF tensor of a model, generated when they are read.

    Args:
        spec: The model.
        seed: Which weights.
        dtype: float32 or bfloat16; the spec's own by default.
        device: A GPU, as torch names it, to compute on: the bits are the same, and many times as
            fast. None computes with NumPy.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        seed: int = 0,
        dtype: str | None = None,
        device: str | None = None,
    ) -> None:
        self.seed = seed
        self._device = device
        kind = dtype_named(dtype or spec.params_dtype)
        self.tensors = {
            name: TensorInfo(shape=shape, dtype=kind) for name, shape in hf_tensors(spec).items()
        }

    def read_into(self, name: str, box: Box, out: Words) -> None:
        """Generate a box; see `TensorSource`."""
        info = self.tensors[name]
        mean, std = mean_and_std(name, info.shape)
        if self._device is not None:
            import torch

            from bridge.storage.philox_torch import fill_box

            fill_box(
                out, info.dtype, seed=self.seed, name=name, shape=info.shape, box=box,
                mean=mean, std=std, device=torch.device(self._device),
            )  # fmt: skip
            return
        if len(info.shape) == 1:
            rows = [(box.starts[0], out)]
        elif box.shape[1] == info.shape[1] and out.flags.c_contiguous:
            rows = [(box.starts[0] * info.shape[1], out.reshape(-1))]
        else:
            rows = [
                ((box.starts[0] + row) * info.shape[1] + box.starts[1], out[row])
                for row in range(box.shape[0])
            ]
        for start, words in rows:
            filled = words if words.flags.c_contiguous else np.empty(words.shape, words.dtype)
            fill_words(
                filled, info.dtype, seed=self.seed, name=name, start=start, mean=mean, std=std
            )
            if filled is not words:
                words[...] = filled

    def close(self) -> None:
        """Nothing to release."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Synthesized(NamedTuple):
    """What a synthetic checkpoint came to."""

    nbytes: int
    """Of its weights."""
    nothing_to_do: bool
    """Whether it was complete already."""


@named_refusals()
def synthesize(
    config: Location,
    target: Location,
    *,
    seed: int,
    max_shard_size: int,
    limits: TransferLimits,
    progress: Progress | None = None,
    overwrite: bool = False,
    resume: bool = False,
    staging: Path | None = None,
    crew: Crew | None = None,
) -> Synthesized:
    """Write a synthetic checkpoint of a configuration: shards, index and the `config.json` itself.

    Args:
        config: A `config.json`, or a directory that holds one.
        target: Directory to create.
        seed: Which weights.
        max_shard_size: Bytes per weight file.
        limits: Memory and threads of each process that takes part.
        progress: Who watches.
        overwrite: Replace an existing target.
        resume: Go on with what an earlier attempt at the same checkpoint has left.
        staging: Where files are built before their upload, for a target behind a URL.
        crew: The processes that share the work, all of which make this call.

    Returns:
        What it holds now.
    """
    crew = crew or Alone()
    refuse_overlap(target, [config])
    raw = read_small_file(config_file(config))
    spec = spec_from_hf_config(load_hf_config(config), where=str(config))
    source = SyntheticSource(spec, seed=seed)
    layouts, index = layout_shards(source.tensors, max_shard_size=max_shard_size)
    whole = {
        name: Tiling.concatenate([(name, Box.whole(info.shape))])
        for name, info in source.tensors.items()
    }
    nbytes = total_nbytes(source.tensors.values())
    agree(crew, {"config": spec, "--seed": seed, "target's files": layouts})
    mine = share_of(crew, layouts, [layout.size for layout in layouts])
    job = job_of(layouts, {}, resume=resume, config=hashlib.sha256(raw).hexdigest(), seed=str(seed))
    if resume and crew.gather(is_complete(target, job))[0]:
        if crew.rank == 0 and isinstance(target, Path):
            clear_up(target, job)
        return Synthesized(nbytes=nbytes, nothing_to_do=True)
    with shared_checkpoint(
        target,
        overwrite=overwrite,
        staging=staging,
        last=(INDEX_NAME, CONFIG_NAME),
        job=job,
        crew=crew,
    ) as new:
        effort = sum(map(new.effort, layouts))
        with crew.phase(progress or Silent(), "synthesize", effort) as advance:
            advance(sum(new.effort(layout) for layout in mine if new.is_complete(layout)))
            lacking = [layout for layout in mine if not new.is_complete(layout)]
            new.write_files(lacking, source, whole, limits=limits, advance=advance)
            crew.gather(None)
        if crew.rank == 0:
            new.write_small_file(CONFIG_NAME, raw)
            if index is not None:
                new.write_small_file(INDEX_NAME, index)
    return Synthesized(nbytes=nbytes, nothing_to_do=False)
