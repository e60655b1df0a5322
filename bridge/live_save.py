"""A live Megatron model written to disk: as a Hugging Face directory, or as Megatron's checkpoint.

Towards Hugging Face rank 0 writes what `bridge.live_export` streams. Towards Megatron each rank
writes its own shards, in the files an import cut for the same layout would have: the same bytes.
Both are read back before the target appears, and have a manifest of what they hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import torch

from bridge import __version__
from bridge.comparison import refuse_differences
from bridge.crew.live import LiveCrew
from bridge.crew.sharing import shared_checkpoint
from bridge.dtypes import Dtype, Words, dtype_named
from bridge.hashing import hash_files
from bridge.hf_config import CONFIG_NAME
from bridge.literals import AROUND, changed_literals
from bridge.live_export import export_hf, refuse_no_float
from bridge.live_parameters import matched
from bridge.manifest import Manifest, entry_of
from bridge.megatron_args import checkpoint_args
from bridge.parameters import Parameter
from bridge.plan import Plan
from bridge.progress import Progress, Silent, unwatched
from bridge.record import RECORD_NAME, SIDE_DIRECTORY, SourceRecord, sha256_of
from bridge.sealing import write_manifest
from bridge.spec import ModelSpec, ParallelLayout
from bridge.staging import as_words
from bridge.storage.megatron import MegatronSource, check_stackable, layout_megatron
from bridge.storage.new_checkpoint import NewCheckpoint
from bridge.storage.safetensors import INDEX_NAME, ShardHeader
from bridge.storage.safetensors_layout import layout_like, total_nbytes
from bridge.storage.source import FileLayout, TensorInfo
from bridge.storage.streamed_files import StreamedFiles
from bridge.storage.torch_dist_config import TRACKER_NAME
from bridge.storage.torch_dist_write import iteration_directory
from bridge.tiling import Box, Tile, Tiling, bands
from bridge.transfer import TransferLimits

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

_BAND: Final = 16 << 20
"""Bytes read back at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HfFiles:
    """The Hugging Face directory that a live model came from, as far as saving it goes.

    Args:
        small: Everything but weights, by name.
        headers: Of its weight files; none where they are not at hand.
        index: Of its weight files, if it has one.
    """

    small: Mapping[str, bytes]
    headers: Sequence[ShardHeader] = ()
    index: bytes | None = None


def save_hf(
    model_parts: Sequence[GPTModel],
    spec: ModelSpec,
    layout: ParallelLayout,
    target: Path,
    *,
    files: HfFiles,
    max_shard_size: int,
    weight_dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    crew: LiveCrew,
) -> None:
    """Write a Hugging Face directory. Every rank makes this call, within `crew.live.together`.

    Weights are cut into the files that `files` describes where dtypes and shapes are the same.

    Args:
        model_parts: This rank's, bare.
        spec: The model.
        layout: How it is cut.
        target: Directory to create.
        files: What else goes into it.
        max_shard_size: Bytes per weight file, where the division is our own.
        weight_dtype: Round to this dtype, once.
        overwrite: Replace an existing target, once the new one is complete.
        progress: Who watches.
        crew: The ranks.

    Raises:
        UsageError: BR001, a dtype that holds no floating-point numbers.
        DtypeMismatchError: BR303, finite elements would become infinite in it.
        TargetExistsError: BR304, the target exists and is not an empty directory.
        CheckpointError: BR300, the system refuses.
        VerificationError: BR305, what was written, read back, differs; nothing is left of it.
    """
    refuse_no_float(weight_dtype)
    dtypes = _dtypes(model_parts, spec, layout, crew)
    plan = _plan(spec, layout)
    cast = None if weight_dtype is None else dtype_named(str(weight_dtype))
    tensors = {
        name: TensorInfo(
            shape=shape, dtype=cast or dtypes[str(plan.mcore_to_hf[name].tiles[0].source)]
        )
        for name, shape in plan.hf_shapes.items()
    }
    layouts, index = layout_like(tensors, files.headers, files.index, max_shard_size=max_shard_size)
    with shared_checkpoint(
        target, overwrite=overwrite, last=(INDEX_NAME, CONFIG_NAME), crew=crew
    ) as new:
        place = Path(str(new.written()))
        with (
            crew.phase(progress or Silent(), "export", total_nbytes(tensors.values())) as advance,
            StreamedFiles(layouts if crew.rank == 0 else (), place) as written,
        ):
            for name, weight in export_hf(
                model_parts, spec, layout,
                dst=0, cpu=True, weight_dtype=weight_dtype, advance=advance,
            ):  # fmt: skip
                written.write(name, weight)
        if crew.rank == 0:
            # By rank 0 alone, as it was written: the others may be where the target is not.
            files_now = {layout.path: entry_of(layout) for layout in layouts}
            total = sum(layout.size for layout in layouts)
            with (progress or Silent()).phase("verify", total) as advance:
                files_now = hash_files(place, files_now, limits=TransferLimits(), advance=advance)
            _refuse_tensors(written.differences(files_now))
            refuse_differences(
                AROUND,
                changed_literals(
                    place, layouts, files_now, limits=TransferLimits(), advance=unwatched
                ),
            )
            if index is not None:
                new.write_small_file(INDEX_NAME, index)
            for name, data in files.small.items():
                new.write_small_file(name, data)
            write_manifest(Manifest(target=files_now), new, _what(plan, "hf"))
        crew.gather(None)


def save_megatron(
    model_parts: Sequence[GPTModel],
    spec: ModelSpec,
    layout: ParallelLayout,
    target: Path,
    *,
    files: HfFiles,
    hf_model_id: str | None = None,
    iteration: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
    limits: TransferLimits | None = None,
    crew: LiveCrew,
) -> None:
    """Write Megatron's `torch_dist`, as `import_checkpoint` does for the same model and layout.

    Every rank makes this call, within `crew.live.together`, and must see the target's directory.
    The checkpoint loads at any layout. Of data parallel replicas the first writes.

    Args:
        model_parts: This rank's, bare.
        spec: The model.
        layout: How it is cut.
        target: Directory to create.
        files: Of the Hugging Face directory to export to later; kept beside the checkpoint.
        hf_model_id: That directory's name on the Hub.
        iteration: Number in the tracker and of the directory.
        overwrite: Replace an existing target, once the new one is complete.
        progress: Who watches.
        limits: Memory and threads of each rank.
        crew: The ranks.

    Raises:
        TargetExistsError: BR304, the target exists and is not an empty directory.
        CheckpointError: BR300, the system refuses.
        DtypeMismatchError: BR303, layers that are to be stacked differ in dtype.
        VerificationError: BR305, what was written, read back, differs; nothing is left of it.
    """
    dtypes = _dtypes(model_parts, spec, layout, crew)
    plan = _plan(spec, layout)
    check_stackable(plan.parameters, dtypes, spec, where="the live model")
    names = [str(dtype) for dtype in dtypes.values()]
    stored = replace(spec, params_dtype=max(dict.fromkeys(names), key=names.count))
    checkpoint = layout_megatron(
        plan.parameters, dtypes, layout,
        spec=spec, args=checkpoint_args(stored, layout), iteration=iteration,
    )  # fmt: skip
    live = _LiveSource(model_parts, spec, layout, dtypes)
    mine = [file for file in checkpoint.files if live.writes(file)]
    limits = limits or TransferLimits()
    with shared_checkpoint(target, overwrite=overwrite, last=(TRACKER_NAME,), crew=crew) as new:
        total = sum(file.payload_nbytes + file.size for file in mine)
        with crew.phase(progress or Silent(), "save", total) as advance:
            whole = {name: _as_it_is(one) for name, one in plan.parameters.items()}
            hashed = new.write_files(mine, live, whole, limits=limits, advance=advance, hashed=True)
        shares = crew.gather(hashed)
        if crew.rank == 0:
            for name, data in checkpoint.small_files.items():
                new.write_small_file(name, data)
            _write_record(new, plan, files, hf_model_id, iteration)
        crew.gather(None)  # the checkpoint can be opened now
        with MegatronSource(new.written() / iteration_directory(iteration)) as written:
            _refuse_tensors(live.differences(written, mine))
        refuse_differences(
            AROUND, changed_literals(new.written(), mine, hashed, limits=limits, advance=unwatched)
        )
        crew.gather(None)
        if crew.rank == 0:
            everything = {name: entry for share in shares for name, entry in share.items()}
            write_manifest(Manifest(target=everything), new, _what(plan, "megatron"))
        crew.gather(None)


def _what(plan: Plan, target: Literal["hf", "megatron"]) -> dict[str, str]:
    """For the manifest, in the words of a conversion's."""
    return {"version of nemotron-bridge": __version__, "plan": plan.digest(), "saved": target}


def _write_record(
    new: NewCheckpoint, plan: Plan, files: HfFiles, hf_model_id: str | None, iteration: int
) -> None:
    for name, data in files.small.items():
        new.write_small_file(f"{SIDE_DIRECTORY}/{name}", data)
    record = SourceRecord(
        bridge_version=__version__,
        plan_sha256=plan.digest(),
        iteration=iteration,
        headers={header.file: header.raw for header in files.headers},
        index=files.index,
        # No hashes of tensors: the live ones need not be those that were loaded.
        side_file_sha256={name: sha256_of(data) for name, data in files.small.items()},
        hf_model_id=hf_model_id,
    )
    new.write_small_file(RECORD_NAME, record.to_json())


class _LiveSource:
    """What this rank holds, as boxes of whole parameters."""

    def __init__(
        self,
        model_parts: Sequence[GPTModel],
        spec: ModelSpec,
        layout: ParallelLayout,
        dtypes: Mapping[str, Dtype],
    ) -> None:
        from megatron.core import parallel_state

        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        tp = layout.tensor_model_parallel_size
        self._group = parallel_state.get_pipeline_model_parallel_rank() * tp + tp_rank
        self._is_first_replica = parallel_state.get_data_parallel_rank() == 0
        self._shards: dict[str, list[tuple[Box, torch.Tensor]]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for one, parameter in matched(model_parts, spec, layout):
            self.tensors[one.name] = TensorInfo(shape=parameter.shape, dtype=dtypes[one.name])
            self._shards[one.name] = list(_split(one.tensor.detach(), parameter, tp_rank, tp))

    def writes(self, file: FileLayout) -> bool:
        """Whether a file, one of `layout_megatron`'s, is this rank's to write."""
        group = Path(file.path).name.split("_")[2]
        return self._is_first_replica and group == str(self._group)

    def read_into(self, name: str, box: Box, out: Words) -> None:
        """See `TensorSource`."""
        for place, shard in self._shards[name]:
            if box.intersect(place) == box:
                part = shard[box.relative_to(place).slices].cpu().contiguous()
                out[...] = as_words(part, self.tensors[name].dtype)
                return
        raise AssertionError(f"{name}{box} is not on this rank")

    def close(self) -> None:
        """Nothing is open."""

    def differences(self, written: MegatronSource, files: Sequence[FileLayout]) -> list[str]:
        """The boxes of these files that are not, as they can be read now, what is live."""
        wrong = []
        for payload in (payload for file in files for payload in file.payloads):
            word = self.tensors[payload.tensor].dtype.word
            for box in bands(payload.box, max_elements=_BAND // word.itemsize):
                ours, theirs = np.empty(box.shape, word), np.empty(box.shape, word)
                self.read_into(payload.tensor, box, ours)
                written.read_into(payload.tensor, box, theirs)
                if not np.array_equal(ours, theirs):
                    wrong.append(f"{payload.tensor}{box}")
        return wrong


def _split(
    tensor: torch.Tensor, parameter: Parameter, tp_rank: int, tp: int
) -> list[tuple[Box, torch.Tensor]]:
    """A shard as the boxes of the whole that it is made of."""
    axis, start, found = parameter.tp_axis or 0, 0, []
    for box in parameter.shard_boxes(tp_rank, tp):
        found.append((box, tensor.narrow(axis, start, box.shape[axis])))
        start += box.shape[axis]
    return found


def _as_it_is(parameter: Parameter) -> Tiling:
    whole = Box.whole(parameter.shape)
    return Tiling(parameter.shape, (Tile(parameter.name, whole, whole),))


def _plan(spec: ModelSpec, layout: ParallelLayout) -> Plan:
    rows = spec.padded_vocab_size(
        layout.tensor_model_parallel_size,
        make_vocab_size_divisible_by=layout.make_vocab_size_divisible_by,
    )
    return Plan(spec, rows)


def _dtypes(
    model_parts: Sequence[GPTModel], spec: ModelSpec, layout: ParallelLayout, crew: LiveCrew
) -> dict[str, Dtype]:
    """The dtype of every parameter of the model, on every rank, in the model's order."""
    mine = {one.name: str(one.tensor.dtype) for one, _ in matched(model_parts, spec, layout)}
    found = {name: dtype for share in crew.gather(mine) for name, dtype in share.items()}
    return {name: dtype_named(found[name]) for name in _plan(spec, layout).parameters}


def _refuse_tensors(wrong: Sequence[str]) -> None:
    refuse_differences(
        f"{len(wrong)} tensors differ from the live model after reading them back", wrong
    )
