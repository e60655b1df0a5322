"""What a checkpoint holds besides its weights, on its way through a conversion."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from bridge.casting import config_in, main_dtype, stated_dtype
from bridge.dtypes import Dtype
from bridge.errors import VerificationError
from bridge.hf_config import CONFIG_NAME, hf_config_from_spec
from bridge.record import SIDE_DIRECTORY, SourceRecord, sha256_of
from bridge.spec import ModelSpec
from bridge.storage.new_checkpoint import NewCheckpoint
from bridge.storage.remote import Location
from bridge.storage.source import TensorInfo
from bridge.storage.target import read_small_file, side_files


def carry(
    source: Location,
    names: Iterable[str],
    target: NewCheckpoint,
    *,
    below: str = "",
    dtype: Dtype | None = None,
) -> dict[str, tuple[bytes, bytes]]:
    """Copy side files byte for byte, but for a configuration whose dtype has changed.

    Returns:
        What was read and what was written, by name.
    """
    found = {}
    for name in names:
        data = read_small_file(source / name)
        written = data
        if name == CONFIG_NAME and dtype is not None:
            written = config_in(data, dtype, where=str(source / name))
        target.write_small_file(f"{below}{name}", written)
        found[name] = data, written
    return found


def write_side_files(
    new: NewCheckpoint,
    source: Location | None,
    spec: ModelSpec,
    record: SourceRecord | None,
    *,
    asked: Dtype | None,
    weights: Mapping[str, TensorInfo],
) -> tuple[bytes, list[str]]:
    """What an export holds besides weights: of a directory, a bare config, or made from `spec`.

    Args:
        new: The export.
        source: The directory or the configuration.
        spec: The model.
        record: Of the import, whose side files these should still be.
        asked: The dtype that was asked for, which the configuration is to say.
        weights: Those of the export, whose dtype it is to say otherwise.

    Returns:
        The `config.json` that was written, and what to tell of it.

    Raises:
        VerificationError: BR305, files that are not those which were imported.
    """
    if source is None:
        _check_side_files(record, {}, Path(SIDE_DIRECTORY))
        where = CONFIG_NAME
        config = json.dumps(hf_config_from_spec(spec), indent=2).encode() + b"\n"
    else:
        path = source / CONFIG_NAME if source.is_dir() else source
        where, config = str(path), read_small_file(path)
    dtype, notes = asked, []
    if asked is None and (dtype := _dtype_to_state(config, record, weights, where)) is not None:
        notes.append(
            f"config.json says {dtype.name}, the weights' dtype; {where} says "
            f"{stated_dtype(config, where=where)}, to which a loader would round them"
        )
    if source is not None and source.is_dir():
        carried = carry(source, side_files(source)[0], new, dtype=dtype)
        found = {name: sha256_of(data) for name, (data, _) in carried.items()}
        _check_side_files(record, found, source)
        return carried[CONFIG_NAME][1], notes
    if dtype is not None:
        config = config_in(config, dtype, where=where)
    new.write_small_file(CONFIG_NAME, config)
    return config, notes


def _dtype_to_state(
    config: bytes,
    record: SourceRecord | None,
    weights: Mapping[str, TensorInfo],
    where: str,
) -> Dtype | None:
    """The weights' dtype where the configuration says one that none of them has.

    An import whose weights have their dtypes still gives back what it was made from, be it at odds
    with itself.
    """
    stated = stated_dtype(config, where=where)
    dtypes = {info.dtype for info in weights.values()}
    if stated is None or stated in {dtype.name for dtype in dtypes}:
        return None
    if record is not None:
        headers = record.shard_headers(where)
        if dtypes == {one.info.dtype for head in headers for one in head.tensors.values()}:
            return None
    return main_dtype(weights)


def refuse_changed_config(record: SourceRecord | None, directory: Location) -> None:
    """Hold a kept configuration against its hash on record, before a changed one is parsed.

    One that is gone is not what was imported either: nobody is given another without asking.

    Raises:
        VerificationError: BR305, it is not the one that was imported.
    """
    path = directory / CONFIG_NAME
    if record is None or CONFIG_NAME not in record.side_file_sha256:
        return
    if not path.is_file() and path.exists():
        return  # what is no file is refused by whoever opens it
    found = {CONFIG_NAME: sha256_of(read_small_file(path))} if path.is_file() else {}
    only = replace(record, side_file_sha256={CONFIG_NAME: record.side_file_sha256[CONFIG_NAME]})
    _check_side_files(only, found, directory)


def _check_side_files(
    record: SourceRecord | None, carried: Mapping[str, str], directory: Location
) -> None:
    if record is None:
        return
    changed = sorted(
        name
        for name in record.side_file_sha256.keys() | carried.keys()
        if record.side_file_sha256.get(name) != carried.get(name)
    )
    if changed:
        raise VerificationError(
            "side files are not those that were imported",
            where=[str(directory / name) for name in changed],
            hint="restore them, or export with --hf-model to take another directory's",
        )
