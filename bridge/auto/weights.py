"""Weights of live models, on all ranks: loaded, streamed, saved."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from bridge.agreement import spec_differences
from bridge.auto.source import HfPretrained
from bridge.crew.live import LiveCrew, together
from bridge.dtypes import dtype_named
from bridge.errors import InconsistentConfigError
from bridge.hf_config import CONFIG_NAME
from bridge.live_export import HFWeightTuple, export_hf
from bridge.live_layout import bare_parts, layout_of
from bridge.live_parameters import load_hf
from bridge.live_save import HfFiles
from bridge.live_save import save_hf as save_hf_directory
from bridge.live_save import save_megatron as save_megatron_checkpoint
from bridge.parameters import hf_tensors
from bridge.plan import account_for
from bridge.progress import Progress, Silent
from bridge.spec import ModelSpec, ParallelLayout
from bridge.storage.safetensors import SafetensorsSource

_OF_THE_MODEL: Final = frozenset({CONFIG_NAME, "generation_config.json"})
"""Files that stay the model's when the tokenizer is another's."""


def load_hf_weights(
    parts: list[Any], spec: ModelSpec, layout: ParallelLayout, source: HfPretrained
) -> None:
    """Fill bare model parts, once every tensor is accounted for. All ranks call, or all fail.

    Raises:
        InconsistentConfigError: BR104, the checkpoint is of another model.
        AccountingError: BR301, tensors missing, unexpected or of another shape.
    """
    with together(LiveCrew()) as crew:
        wrong = spec_differences(spec, source.spec(), names=("the bridge", source.where))
        if wrong:
            raise InconsistentConfigError("the weights are of another model", where=wrong)
        location = source.location(weights=True)
        with SafetensorsSource(location, strict_index=False) as tensors:
            account_for(
                hf_tensors(spec), tensors.tensors,
                where=str(location), also=tensors.index_problems,
            )  # fmt: skip
            load_hf(parts, spec, layout, tensors)
        crew.gather(None)


def stream_hf_weights(
    model: Any,
    spec: ModelSpec,
    *,
    cpu: bool,
    show_progress: bool,
    only: Collection[str] | None,
    weight_dtype: torch.dtype | None,
    dst: int | None,
) -> Iterator[HFWeightTuple]:
    """The tensors of a live model; see `AutoBridge.export_hf_weights`."""
    parts = bare_parts(model)
    layout = layout_of(parts, spec)
    total = sum(shape.numel() for shape in map(torch.Size, hf_tensors(spec).values()))
    total *= parts[0].config.params_dtype.itemsize
    with progress_here(show=show_progress).phase("export", total) as advance:
        yield from export_hf(
            parts, spec, layout,
            only=only, dst=dst, cpu=cpu, weight_dtype=weight_dtype, advance=advance,
        )  # fmt: skip


def save_hf(
    model: Any,
    spec: ModelSpec,
    path: str | Path,
    source: HfPretrained,
    *,
    extra: str | Path | None,
    only_weights: bool,
    show_progress: bool,
    weight_dtype: torch.dtype | None,
    overwrite: bool,
    max_shard_size: int,
) -> None:
    """A Hugging Face directory of a live model; see `AutoBridge.save_hf_pretrained`."""
    parts = bare_parts(model)
    with together(LiveCrew()) as crew:
        files = HfFiles(small={})
        if crew.rank == 0:
            files = source.files(extra)
            held = weight_dtype or parts[0].config.params_dtype
            files = replace(files, small={} if only_weights else _with_dtype(files, source, held))
        save_hf_directory(
            parts, spec, layout_of(parts, spec), Path(path),
            files=files, max_shard_size=max_shard_size, weight_dtype=weight_dtype,
            overwrite=overwrite, progress=progress_here(show=show_progress), crew=crew,
        )  # fmt: skip


def save_megatron(
    model: Any,
    spec: ModelSpec,
    path: str | Path,
    source: HfPretrained,
    *,
    tokenizer: str | Path | None,
    show_progress: bool,
    overwrite: bool,
) -> None:
    """A Megatron checkpoint of a live model; see `AutoBridge.save_megatron_model`."""
    parts = bare_parts(model)
    with together(LiveCrew()) as crew:
        files = HfFiles(small={})
        if crew.rank == 0:
            files = source.files()
            if tokenizer is not None:
                theirs = HfPretrained.of_checkpoint(
                    str(tokenizer), source.access, trust_remote_code=source.trust_remote_code
                ).files()
                ours = {name: files.small[name] for name in _OF_THE_MODEL & files.small.keys()}
                files = replace(files, small={**theirs.small, **ours})
            held = parts[0].config.params_dtype
            files = replace(files, small=_with_dtype(files, source, held))
        save_megatron_checkpoint(
            parts, spec, layout_of(parts, spec), Path(path),
            files=files, hf_model_id=source.hub_id, overwrite=overwrite,
            progress=progress_here(show=show_progress), crew=crew,
        )  # fmt: skip


def _with_dtype(files: HfFiles, source: HfPretrained, held: torch.dtype) -> dict[str, bytes]:
    """The small files, `config.json` naming the dtype that the weights beside it have."""
    dtype = dtype_named(str(held)).name
    small = dict(files.small)
    if dtype != source.spec().params_dtype:
        config = json.loads(small[CONFIG_NAME])
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype
        small[CONFIG_NAME] = json.dumps(config, indent=2).encode() + b"\n"
    return small


def progress_here(*, show: bool) -> Progress:
    """Bars on rank 0's stderr, or nothing."""
    if not show or (torch.distributed.is_initialized() and torch.distributed.get_rank()):
        return Silent()
    from bridge.console import RichProgress

    return RichProgress()
