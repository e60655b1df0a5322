"""Convert a checkpoint file to file: no model is built, memory does not grow with the model.

Both directions run the same way: read the configuration, account for every tensor, lay out the
target's files, stream them tile by tile, read them back and compare with the source bit by bit,
and only then let the target appear.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from bridge import __version__
from bridge.agreement import described_model
from bridge.casting import (
    dtype_to_round_to,
    files_in,
    main_dtype,
    tensors_in,
)
from bridge.consumers import consumer_notes
from bridge.conversion import ConversionOptions, ConversionReport
from bridge.conversion_job import ConversionJob
from bridge.conversion_notes import check_unchanged, exact_notes, import_notes, vocabulary_notes
from bridge.crew.agreement import agree_on_conversion
from bridge.crew.protocol import Alone, Crew
from bridge.crew.sharing import shared_checkpoint
from bridge.dtypes import Dtype, dtype_named
from bridge.errors import named_refusals
from bridge.hf_config import (
    CONFIG_NAME,
    config_file,
    load_hf_config,
    spec_from_hf_config,
)
from bridge.megatron_args import checkpoint_args
from bridge.megatron_bridge import megatron_bridge_files
from bridge.pipeline import plan_layout
from bridge.plan import Plan, account_for
from bridge.read_side import SourceWatch, hf_side, megatron_side
from bridge.record import (
    RECORD_NAME,
    SIDE_DIRECTORY,
    SourceRecord,
    read_record,
    sha256_of,
)
from bridge.sealing import done_notes, tensor_hashes, write_manifest
from bridge.side_files import carry, refuse_changed_config, write_side_files
from bridge.spec import ModelSpec
from bridge.storage.input_files import obeys_follow_links
from bridge.storage.journal import fingerprint
from bridge.storage.megatron import MegatronSource, check_stackable, layout_megatron
from bridge.storage.remote import Location
from bridge.storage.safetensors import INDEX_NAME, SafetensorsSource
from bridge.storage.safetensors_layout import layout_like, layout_shards
from bridge.storage.source import FileLayout, TensorInfo
from bridge.storage.target import (
    read_small_file,
    refuse_overlap,
    side_files,
)
from bridge.storage.torch_dist_config import TRACKER_NAME
from bridge.storage.torch_dist_write import iteration_directory

DEFAULT_MAX_SHARD_SIZE: Final = 5_000_000_000
_IMPORTED_ITERATION: Final = 0
_HF_MODEL: Final = "--hf-model: "
"""Before names of files there, wherever that is."""


@named_refusals()
@obeys_follow_links
def import_checkpoint(
    hf: Location,
    megatron: Location,
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    num_layers_per_stage: Sequence[int] | None = None,
    make_vocab_size_divisible_by: int = 128,
    options: ConversionOptions | None = None,
    crew: Crew | None = None,
) -> ConversionReport:
    """Convert a Hugging Face checkpoint to Megatron's `torch_dist`.

    The checkpoint loads at any TP and PP whatever sizes are given here; they decide how far the
    vocabulary is padded and cut the files the way those ranks would have written them, which makes
    loading at that layout read nothing twice.

    Args:
        hf: Directory with `config.json` and safetensors weights.
        megatron: Directory to create.
        tensor_model_parallel_size: TP the files are cut for.
        pipeline_model_parallel_size: PP the files are cut for.
        num_layers_per_stage: Layers of each pipeline rank; by default they are balanced.
        make_vocab_size_divisible_by: The vocabulary is padded to a multiple of this times TP.
        options: Memory, verification, progress.
        crew: The processes that share the work, all of which make this call; `crew_of` starts
            them. The files do not depend on how many there are.

    Raises:
        ConfigError: BR1xx, the configuration is not one the bridge can honour.
        AccountingError: BR301, the tensors are not those of the configuration.
        VerificationError: BR305, what was written, read back, differs; the target is not created.
    """
    options = options or ConversionOptions()
    crew = crew or Alone()
    refuse_overlap(megatron, [hf])
    spec = read_spec(hf, carry=options.carry)
    layout = plan_layout(
        spec,
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        num_layers_per_stage=num_layers_per_stage,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
    )
    plan = Plan(spec, checkpoint_args(spec, layout)["padded_vocab_size"])
    with SafetensorsSource(hf, strict_index=False) as source:
        account_for(plan.hf_shapes, source.tensors, where=str(hf), also=source.index_problems)
        dtype = dtype_to_round_to(options.dtype, source.tensors, exact=options.exact)
        # What has the dtype already is not rounded; the configuration is to say it all the same.
        asked = dtype_named(options.dtype) if options.dtype is not None else None
        tensors = tensors_in(source.tensors, dtype)
        dtypes = plan.target_dtypes(plan.hf_to_mcore, tensors, where=str(hf))
        check_stackable(plan.parameters, dtypes, spec, where=str(hf))
        stored = replace(spec, params_dtype=main_dtype(tensors).name)
        files = layout_megatron(
            plan.parameters,
            dtypes,
            layout,
            spec=spec,
            args=checkpoint_args(stored, layout),
            iteration=_IMPORTED_ITERATION,
        )
        index = read_small_file(hf / INDEX_NAME) if (hf / INDEX_NAME).is_file() else None
        headers, index = files_in(source.headers.values(), index, dtype, where=str(hf / INDEX_NAME))
        record = SourceRecord(
            bridge_version=__version__,
            plan_sha256=plan.digest(),
            iteration=_IMPORTED_ITERATION,
            carried_fields=tuple(options.carry),
            headers=headers,
            index=index,
            hf_model_id=options.hf_model_id,
        )
        work = ConversionJob("hf_to_mcore", hf, megatron, plan, options, crew, dtype)
        agree_on_conversion(work, files.files, (record.headers, record.index))
        names, left = side_files(hf)
        read = hf_side(source, names)
        left = [name for name in left if name not in source.headers and name != INDEX_NAME]
        notes = exact_notes(asked, dtype) + import_notes(stored)
        notes += [f"not carried: {name}" for name in left]
        job = work.job(
            read,
            files.files,
            small=[record.to_json(), str(asked).encode(), *files.small_files.values()],
        )
        watch = SourceWatch(side=read, job=job)
        if done := work.done_already(read, job):
            digests = tensor_hashes(done.source, plan.hf_shapes)
            return work.report(tensors, plan.hf_to_mcore, digests, [*done_notes(done), *notes])
        with shared_checkpoint(
            megatron,
            overwrite=options.overwrite,
            staging=options.staging,
            last=(TRACKER_NAME,),
            job=job,
            crew=crew,
        ) as new:
            work.write(files.files, new, source, plan.hf_to_mcore, read)
            if crew.rank == 0:
                extra = megatron_bridge_files(
                    stored,
                    padded_vocab_size=plan.padded_vocab_size,
                    iteration_directory=iteration_directory(_IMPORTED_ITERATION),
                )
                for name, data in {**extra, **files.small_files}.items():
                    new.write_small_file(name, data)
                carried = carry(hf, names, new, below=f"{SIDE_DIRECTORY}/", dtype=asked)
                side = {name: sha256_of(data) for name, (_, data) in carried.items()}
                record = replace(record, side_file_sha256=side)
            crew.gather(None)  # the checkpoint can be opened now
            # The tracker that names the iteration may not be there yet.
            directory = new.written() / iteration_directory(_IMPORTED_ITERATION)
            with MegatronSource(directory) as written:
                with watch.blamed():
                    digests = work.verify(source, written, read=read, layouts=files.files, new=new)
                work.verify_padding(written)
            if crew.rank == 0:
                record = replace(record, tensor_sha256=digests)
                new.write_small_file(RECORD_NAME, record.to_json())
                write_manifest(work.hashes, new, job.what)
            watch.refuse_changes()
            crew.gather(None)  # nobody looks at it any more, or finds fault
        return work.report(tensors, plan.hf_to_mcore, digests, notes)


@named_refusals()
@obeys_follow_links
def export_checkpoint(
    megatron: Location,
    hf: Location,
    *,
    hf_model: Location | None = None,
    max_shard_size: int | None = None,
    options: ConversionOptions | None = None,
    crew: Crew | None = None,
) -> ConversionReport:
    """Convert a Megatron checkpoint, `torch_dist` or `torch`, to a Hugging Face directory.

    A checkpoint that this bridge imported gives back the source directory, every file of it byte
    for byte. Any other needs `hf_model` for its `config.json` and tokenizer, or gets a
    configuration written from the checkpoint's `args`.

    Args:
        megatron: The checkpoint's root, one of its iteration directories, or NeMo 2's directory.
        hf: Directory to create.
        hf_model: Directory (or config.json) whose configuration and side files to take. Its
            weights are not read.
        max_shard_size: Bytes per weight file; None keeps the source's own division, and takes 5 GB
            where that is not known.
        options: Memory, verification, progress.
        crew: The processes that share the work, all of which make this call; `crew_of` starts
            them. The files do not depend on how many there are.

    Raises:
        ConfigError: BR1xx, no configuration, or one that contradicts the checkpoint.
        CheckpointError: BR300, no checkpoint, missing ranks, or one of a kind that is not read.
        CorruptFileError: BR302, files that are damaged or contradict each other.
        DtypeMismatchError: BR303, dtypes that would mix, or values too large for the one asked.
        AccountingError: BR301, the checkpoint does not hold that model.
        VerificationError: BR305, what was written, read back, differs; the target is not created.
    """
    options = options or ConversionOptions()
    crew = crew or Alone()
    refuse_overlap(hf, [megatron, *([] if hf_model is None else [hf_model])])
    with MegatronSource(megatron) as source:
        record = read_record(source.root) if hf_model is None else None
        refuse_changed_config(record, source.root / SIDE_DIRECTORY)
        spec, side_source, notes = _export_spec(source, hf_model, options.carry)
        plan = Plan.of_checkpoint(spec, source.tensors)
        notes += vocabulary_notes(source, plan)
        account_for(plan.mcore_shapes, source.tensors, where=str(megatron))
        dtype = dtype_to_round_to(options.dtype, source.tensors, exact=options.exact)
        asked = dtype_named(options.dtype) if options.dtype is not None else None
        stored = tensors_in(source.tensors, dtype)
        dtypes = plan.target_dtypes(plan.mcore_to_hf, stored, where=str(megatron))
        tensors = {
            name: TensorInfo(shape=shape, dtype=dtypes[name])
            for name, shape in plan.hf_shapes.items()
        }
        layouts, index = _hf_layouts(tensors, record, max_shard_size, dtype, str(source.root))
        work = ConversionJob("mcore_to_hf", megatron, hf, plan, options, crew, dtype)
        agree_on_conversion(work, layouts, (source.iteration, dict(source.tensors), record))
        read = megatron_side(source, carried=hf_model is None)
        small = [repr(index).encode(), str(asked).encode(), repr(tuple(options.carry)).encode()]
        beside = _beside(hf_model)
        job = work.job(read, layouts, small=small, beside=beside, also=_hashes(hf_model, beside))
        watch = SourceWatch(side=read, job=job, beside=lambda: _beside(hf_model))
        if done := work.done_already(read, job):
            digests = tensor_hashes(done.target, plan.hf_shapes)
            return work.report(stored, plan.mcore_to_hf, digests, [*done_notes(done), *notes])
        with shared_checkpoint(
            hf,
            overwrite=options.overwrite,
            staging=options.staging,
            last=(INDEX_NAME, CONFIG_NAME),
            job=job,
            crew=crew,
        ) as new:
            work.write(layouts, new, source, plan.mcore_to_hf, read)
            if crew.rank == 0:
                if index is not None:
                    new.write_small_file(INDEX_NAME, index)
                config, of_dtype = write_side_files(
                    new, side_source, spec, record, asked=asked, weights=tensors
                )
                notes += of_dtype
                notes += consumer_notes(spec, json.loads(config))
            crew.gather(None)  # the checkpoint can be opened now
            names = [layout.path for layout in layouts]
            with (
                SafetensorsSource(new.written(), files=names) as written,
                watch.blamed(),
            ):
                digests = work.verify(written, source, read=read, layouts=layouts, new=new)
            if crew.rank == 0:
                write_manifest(work.hashes, new, job.what)
            watch.refuse_changes()
            notes = exact_notes(asked, dtype) + notes
            if record is not None and record.iteration == source.iteration and dtype is None:
                notes += check_unchanged(record, digests)
            crew.gather(None)  # nobody looks at it any more, or finds fault
        return work.report(stored, plan.mcore_to_hf, digests, notes)


def _beside(hf_model: Location | None) -> dict[str, str]:
    """What tells that the directory of the side files has changed."""
    if hf_model is None:
        return {}
    if hf_model.is_dir():
        found = fingerprint(hf_model, side_files(hf_model)[0])
    else:
        found = fingerprint(hf_model.parent, [hf_model.name])
    return {f"{_HF_MODEL}{name}": mark for name, mark in found.items()}


def _hashes(hf_model: Location | None, names: Iterable[str]) -> dict[str, str]:
    """sha256 of the same files, which are in no manifest's directory."""
    if hf_model is None:
        return {}
    root = hf_model if hf_model.is_dir() else hf_model.parent
    return {name: sha256_of(read_small_file(root / name.removeprefix(_HF_MODEL))) for name in names}


def read_spec(model: Location, *, carry: Collection[str] = ()) -> ModelSpec:
    """The model described by a checkpoint directory's, or a bare, `config.json`."""
    return spec_from_hf_config(load_hf_config(model), where=str(config_file(model)), carry=carry)


def _export_spec(
    source: MegatronSource, hf_model: Location | None, carry: Collection[str]
) -> tuple[ModelSpec, Location | None, list[str]]:
    """The model to export, where its side files (or bare config) are, and what to tell."""
    notes = [*source.notes, *(f"ignored: {what}" for what in source.ignored)]
    spec, directory = described_model(source, hf_model, carry=carry)
    if directory is None:
        notes.append(
            "config.json was written from the checkpoint's args; pass --hf-model to take the "
            "original's, with its tokenizer"
        )
    return spec, directory, notes


def _hf_layouts(
    tensors: Mapping[str, TensorInfo],
    record: SourceRecord | None,
    max_shard_size: int | None,
    dtype: Dtype | None,
    where: str,
) -> tuple[list[FileLayout], bytes | None]:
    """The source's own files where they are on record and still fit, else our own division."""
    if record is None or max_shard_size is not None:
        return layout_shards(tensors, max_shard_size=max_shard_size or DEFAULT_MAX_SHARD_SIZE)
    raw, index = files_in(record.shard_headers(where), record.index, dtype, where=where)
    headers = replace(record, headers=raw).shard_headers(where)
    return layout_like(tensors, headers, index, max_shard_size=DEFAULT_MAX_SHARD_SIZE)
