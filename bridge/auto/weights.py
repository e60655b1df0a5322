"""Weights of live models, on all ranks: loaded, streamed, saved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from bridge.agreement import spec_differences
from bridge.auto.source import HfPretrained
from bridge.auto.tasks import ConversionTask, conversion_tasks
from bridge.casting import config_in
from bridge.crew.live import LiveCrew, together
from bridge.dtypes import dtype_named
from bridge.errors import InconsistentConfigError, UsageError
from bridge.hf_config import CONFIG_NAME
from bridge.live_export import HFWeightTuple, export_hf, refuse_no_float
from bridge.live_layout import bare_parts, layout_of, refuse_no_groups
from bridge.live_parameters import load_hf
from bridge.live_save import HfFiles
from bridge.live_save import save_hf as save_hf_directory
from bridge.live_save import save_megatron as save_megatron_checkpoint
from bridge.parameters import hf_tensors
from bridge.plan import account_for
from bridge.progress import Progress, Silent
from bridge.rotary import inv_freq
from bridge.spec import ModelSpec, ParallelLayout
from bridge.storage.remote import is_url, parse_location
from bridge.storage.safetensors import SafetensorsSource
from bridge.storage.target import refuse_overlap

_OF_THE_MODEL: Final = frozenset({CONFIG_NAME, "generation_config.json"})
"""Files that stay the model's when the tokenizer is another's."""
_ROUNDING: Final = 8 * torch.finfo(torch.float32).eps
"""By how much of itself the same frequency may differ between devices."""


@contextmanager
def _live(model: Any, spec: ModelSpec) -> Iterator[tuple[list[Any], ParallelLayout, LiveCrew]]:
    """A live model's bare parts, and how it is cut; where one rank fails in the block, all do.

    The pipeline's ranks meet to learn the layout. So that comes first: a rank that had failed
    before would be waiting elsewhere to tell the others.
    """
    refuse_no_groups()
    with together(LiveCrew()) as crew:
        parts = bare_parts(model)
        layout = layout_of(parts, spec)
        crew.gather(None)
        yield parts, layout, crew


def fill(parts: list[Any], spec: ModelSpec, layout: ParallelLayout, source: HfPretrained) -> None:
    """Fill bare model parts, once every tensor is accounted for. All ranks call, or all fail.

    Raises:
        InconsistentConfigError: BR104, checkpoint or live model are of another model.
        AccountingError: BR301, tensors missing, unexpected or of another shape.
    """
    with together(LiveCrew()) as crew:
        _fill(parts, spec, layout, source)
        crew.gather(None)


def load_hf_weights(model: Any, spec: ModelSpec, find: Callable[[], HfPretrained]) -> None:
    """Fill a live model from the checkpoint that each rank finds; see `fill`."""
    with _live(model, spec) as (parts, layout, crew):
        _fill(parts, spec, layout, find())
        crew.gather(None)


def _fill(parts: list[Any], spec: ModelSpec, layout: ParallelLayout, source: HfPretrained) -> None:
    wrong = spec_differences(spec, source.spec(), names=("the bridge", source.where))
    if wrong:
        raise InconsistentConfigError("the weights are of another model", where=wrong)
    _refuse_other_constants(parts, spec)
    location = source.location(weights=True)
    with SafetensorsSource(location, strict_index=False) as tensors:
        account_for(
            hf_tensors(spec), tensors.tensors,
            where=str(location), also=tensors.index_problems,
        )  # fmt: skip
        load_hf(parts, spec, layout, tensors)


def tasks_of(model: Any, spec: ModelSpec) -> list[ConversionTask]:
    """See `AutoBridge.get_conversion_tasks`."""
    with _live(model, spec) as (parts, layout, crew):
        found = conversion_tasks(parts, spec, layout)
        crew.gather(None)
    return found


def refuse_stream(weight_dtype: torch.dtype | None, dst: int | None) -> None:
    """Refuse what a stream would give nothing for, or what is not the weights, when it is asked.

    Raises:
        UsageError: BR001, no such rank, or a dtype that holds no floating-point numbers.
        LayoutError: BR200, Megatron-Core's groups are not formed.
    """
    refuse_no_float(weight_dtype)
    refuse_no_groups()
    size = torch.distributed.get_world_size()
    if dst is not None and not 0 <= dst < size:
        raise UsageError(
            f"no rank would get the tensors: dst={dst} of {size} ranks",
            hint=f"give a global rank from 0 to {size - 1}, or None for all",
        )


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
    with _live(model, spec) as (parts, layout, _):
        pass
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
    with _live(model, spec) as (parts, layout, crew):
        target = _target(path)
        _refuse_other_constants(parts, spec)
        refuse_no_float(weight_dtype)
        if max_shard_size < 1:
            raise UsageError(
                f"max_shard_size={max_shard_size} holds no weights",
                hint="give the bytes of a file, such as 5_000_000_000",
            )
        files = HfFiles(small={})
        if crew.rank == 0:
            refuse_overlap(target, source.places(extra))
            files = source.files(extra)
            held = weight_dtype or parts[0].config.params_dtype
            files = replace(files, small={} if only_weights else _with_dtype(files, source, held))
        crew.gather(None)
        save_hf_directory(
            parts, spec, layout, target,
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
    with _live(model, spec) as (parts, layout, crew):
        target = _target(path)
        _refuse_other_constants(parts, spec)
        files = HfFiles(small={})
        if crew.rank == 0:
            refuse_overlap(target, source.places(tokenizer))
            files = source.files()
            if tokenizer is not None:
                theirs = HfPretrained.of_checkpoint(
                    str(tokenizer), source.access, trust_remote_code=source.trust_remote_code
                ).files()
                ours = {name: files.small[name] for name in _OF_THE_MODEL & files.small.keys()}
                files = replace(files, small={**theirs.small, **ours})
            held = parts[0].config.params_dtype
            files = replace(files, small=_with_dtype(files, source, held))
        crew.gather(None)
        save_megatron_checkpoint(
            parts, spec, layout, target,
            files=files, hf_model_id=source.hub_id, overwrite=overwrite,
            progress=progress_here(show=show_progress), crew=crew,
        )  # fmt: skip


def _with_dtype(files: HfFiles, source: HfPretrained, held: torch.dtype) -> dict[str, bytes]:
    """The small files, `config.json` naming the dtype that the weights beside it have."""
    dtype = dtype_named(str(held))
    small = dict(files.small)
    if dtype.name != source.spec().params_dtype:
        small[CONFIG_NAME] = config_in(small[CONFIG_NAME], dtype, where=source.where)
    return small


def _refuse_other_constants(parts: list[Any], spec: ModelSpec) -> None:
    """No tensor's shape tells these: weights are right only where a model computes with them.

    RoPE's frequencies are compared, in which base and scaling end up: Megatron's own module keeps
    neither. It may have computed them on a GPU, which rounds powers in another way.

    Raises:
        InconsistentConfigError: BR104, the live model has others than the bridge.
    """
    wanted = {
        "layernorm_epsilon": spec.layernorm_epsilon,
        "rotary_base": spec.rope.rotary_base,
    }
    found = {
        "layernorm_epsilon": getattr(parts[0].config, "layernorm_epsilon", None),
        "rotary_base": getattr(parts[0], "rotary_base", None),
    }
    wrong = [
        f"{name}: {found[name]} live, {value} in the bridge's configuration"
        for name, value in wanted.items()
        if found[name] not in (None, value)
    ]
    live = getattr(getattr(parts[0], "rotary_pos_emb", None), "inv_freq", None)
    frequencies = inv_freq(spec.rope, spec.kv_channels)
    if live is not None and not (
        live.shape == frequencies.shape
        and torch.allclose(live.detach().float().cpu(), frequencies, rtol=_ROUNDING, atol=0)
    ):
        wrong.append(
            f"RoPE frequencies: not those of {spec.rope} live, which the bridge's configuration has"
        )
    if wrong:
        raise InconsistentConfigError(
            "the live model computes with other constants than the bridge's model",
            where=wrong,
            hint="use a bridge from the configuration that the model was built with",
        )


def _target(path: object) -> Path:
    """Where a live model is saved: ranks write it in place, so on a disk that they see."""
    if not isinstance(path, str | Path) or not str(path):
        raise UsageError(
            f"{path!r} is no directory to save to", hint="give a path as str or pathlib.Path"
        )
    text = str(path)
    if is_url(text) and not text.startswith("file://"):  # whatever its backend would say
        raise UsageError(
            "a live model is saved to a directory, not to a URL",
            where=text,
            hint="save it to this machine and copy it there, "
            "or convert with import_ckpt or export_ckpt, which write to URLs",
        )
    return Path(str(parse_location(text)))


def progress_here(*, show: bool) -> Progress:
    """Bars on rank 0's stderr, or nothing."""
    if not show or (torch.distributed.is_initialized() and torch.distributed.get_rank()):
        return Silent()
    from bridge.console import RichProgress

    return RichProgress()
