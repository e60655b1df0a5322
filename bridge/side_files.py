"""What a checkpoint holds besides its weights, on its way through a conversion."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from bridge.casting import config_in
from bridge.dtypes import Dtype
from bridge.errors import VerificationError
from bridge.hf_config import CONFIG_NAME, hf_config_from_spec
from bridge.record import SourceRecord, sha256_of
from bridge.spec import ModelSpec
from bridge.storage.new_checkpoint import NewCheckpoint
from bridge.storage.remote import Location
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
    dtype: Dtype | None,
) -> bytes:
    """What an export holds besides weights: of a directory, a bare config, or made from `spec`.

    Args:
        new: The export.
        source: The directory or the configuration.
        spec: The model.
        record: Of the import, whose side files these should still be.
        dtype: What the configuration is to say; None leaves it as it is.

    Returns:
        The `config.json` that was written.

    Raises:
        VerificationError: BR305, files that are not those which were imported.
    """
    if source is not None and source.is_dir():
        carried = carry(source, side_files(source)[0], new, dtype=dtype)
        found = {name: sha256_of(data) for name, (data, _) in carried.items()}
        _check_side_files(record, found, source)
        return carried[CONFIG_NAME][1]
    if source is None:
        config = json.dumps(hf_config_from_spec(spec), indent=2).encode() + b"\n"
    else:
        config = read_small_file(source)
    if dtype is not None:
        config = config_in(config, dtype, where=str(source or CONFIG_NAME))
    new.write_small_file(CONFIG_NAME, config)
    return config


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
