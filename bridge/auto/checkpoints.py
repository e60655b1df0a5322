"""Checkpoints of `AutoBridge`, file to file, and Megatron's loaded into live models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.agreement import check_agreement
from bridge.auto.groups import crew_here
from bridge.auto.source import small_files
from bridge.auto.weights import progress_here
from bridge.conversion import ConversionOptions
from bridge.convert import export_checkpoint, import_checkpoint
from bridge.crew.live import LiveCrew, together
from bridge.errors import CorruptFileError, UsageError
from bridge.live_parameters import load_megatron
from bridge.plan import Plan, account_for
from bridge.record import read_record, sha256_of
from bridge.spec import ModelSpec, ParallelLayout
from bridge.storage.megatron import MegatronSource
from bridge.storage.remote import Location, parse_location
from bridge.storage.target import read_small_file, refuse_overlap
from bridge.storage.torch_dist_iteration import open_checkpoint
from bridge.strict_yaml import parse_yaml

if TYPE_CHECKING:
    from bridge.auto.base import ModelBridge


def import_(
    find: Callable[[], ModelBridge],
    megatron_path: str | Path,
    *,
    show_progress: bool,
    overwrite: bool,
) -> None:
    """Convert what each rank finds; see `AutoBridge.import_ckpt`."""
    with together(crew_here()) as crew:
        bridge = find()
        source = bridge.hf_pretrained
        _refuse_another_dtype(
            bridge,
            "an import",
            "load the checkpoint at the dtype you want: a provider's params_dtype",
        )
        options = ConversionOptions(
            progress=progress_here(show=show_progress),
            overwrite=overwrite,
            hf_model_id=source.hub_id,
        )
        target = parse_location(str(megatron_path))
        import_checkpoint(source.location(weights=True), target, options=options, crew=crew)


def export(
    bridge: ModelBridge,
    megatron_path: str | Path,
    hf_path: str | Path,
    *,
    source_path: str | Path | None,
    show_progress: bool,
    overwrite: bool,
) -> None:
    """Convert back; see `AutoBridge.export_ckpt`."""
    source = bridge.hf_pretrained
    with together(crew_here()) as crew:
        _refuse_another_dtype(
            bridge, "an export", "leave it away: weights are written as the checkpoint has them; "
            "`nemotron-bridge export --dtype` rounds",
        )  # fmt: skip
        options = ConversionOptions(progress=progress_here(show=show_progress), overwrite=overwrite)
        megatron, target = parse_location(str(megatron_path)), parse_location(str(hf_path))
        # Before anything else: the conversion may be told of neither, or of a copy of them.
        refuse_overlap(target, source.places(source_path))
        with source.as_directory(source_path) as side:
            # What the checkpoint keeps of its source says more: how weights were cut into files.
            hf_model = None if source_path is None and _keeps(megatron, side) else side
            export_checkpoint(megatron, target, hf_model=hf_model, options=options, crew=crew)


def _refuse_another_dtype(bridge: ModelBridge, what: str, hint: str) -> None:
    source = bridge.hf_pretrained
    if bridge.spec.params_dtype != source.spec().params_dtype:
        raise UsageError(
            f"{what} changes no dtype, and {bridge.spec.params_dtype} is asked for",
            where=f"{source.where}: {source.spec().params_dtype}",
            hint=hint,
        )


def _keeps(megatron: Location, side: Location) -> bool:
    """Whether a checkpoint was imported from a directory with just these side files."""
    directory, _ = open_checkpoint(megatron.absolute())
    record = read_record(directory.parent)
    if record is None:
        return False
    small = small_files(side)
    return record.side_file_sha256 == {name: sha256_of(data) for name, data in small.items()}


def load(parts: list[Any], spec: ModelSpec, layout: ParallelLayout, path: str | Path) -> None:
    """Fill bare model parts from a Megatron checkpoint. All ranks call, or all fail.

    Raises:
        CheckpointError: BR300, no checkpoint there.
        InconsistentConfigError: BR104, it is of another model.
        AccountingError: BR301, parameters missing, unexpected or of another shape.
    """
    with together(LiveCrew()) as crew:
        with MegatronSource(parse_location(str(path))) as source:
            check_agreement(source, spec, where="the bridge's configuration")
            plan = Plan.of_checkpoint(spec, source.tensors)
            account_for(plan.mcore_shapes, source.tensors, where=str(path))
            load_megatron(parts, spec, layout, source)
        crew.gather(None)


def hf_model_id_of(path: str | Path) -> str | None:
    """The Hub id on record; see `AutoBridge.get_hf_model_id_from_checkpoint`."""
    directory, _ = open_checkpoint(parse_location(str(path)).absolute())
    record = read_record(directory.parent)
    if record is not None and record.hf_model_id is not None:
        return record.hf_model_id
    theirs = directory / "run_config.yaml"
    if not theirs.is_file():
        return None
    try:
        model = parse_yaml(read_small_file(theirs)).get("model", {})
    except (ValueError, AttributeError) as error:
        raise CorruptFileError(f"not a run's configuration: {error}", where=str(theirs)) from None
    found = model.get("hf_model_id") if isinstance(model, dict) else None
    return None if found is None else str(found)
