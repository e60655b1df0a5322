"""An object store on the disk, which outlives the process: `torture:///DIRECTORY/bucket/...`.

Objects appear whole or not at all, and outlive a loss of power once they have, as in S3; nothing
else can be relied on.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Any, Final

import fsspec
from fsspec.implementations.local import LocalFileSystem

PROTOCOL: Final = "torture"
BUCKET: Final = "bucket"


class Store(LocalFileSystem):  # type: ignore[misc]  # fsspec has no types
    """`LocalFileSystem` under another name, whose files appear whole."""

    protocol = PROTOCOL

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:  # noqa: ANN401 - fsspec's
        return str(LocalFileSystem._strip_protocol(str(path).removeprefix(f"{PROTOCOL}://")))  # noqa: SLF001 - fsspec's way to extend it

    def unstrip_protocol(self, name: str) -> str:
        """The URL of a path."""
        return f"{PROTOCOL}://{self._strip_protocol(name)}"

    def put_file(self, lpath: Any, rpath: Any, callback: Any = None, **_: Any) -> None:  # noqa: ANN401 - fsspec's
        """Store a file."""
        del callback
        upload, target = _upload(self._strip_protocol(rpath))
        shutil.copyfile(lpath, upload)
        _appear(upload, target)

    def pipe_file(self, path: Any, value: bytes, mode: str = "overwrite", **_: Any) -> None:  # noqa: ANN401 - fsspec's
        """Store bytes."""
        del mode
        upload, target = _upload(self._strip_protocol(path))
        upload.write_bytes(value)
        _appear(upload, target)


def _upload(path: str) -> tuple[Path, Path]:
    """Where an object is built, out of every listing's sight, and where it appears."""
    root, _, _ = path.partition(f"/{BUCKET}/")
    uploads = Path(root) / "uploads"
    uploads.mkdir(exist_ok=True)
    return uploads / uuid.uuid4().hex, Path(path)


def _appear(upload: Path, target: Path) -> None:
    with upload.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(upload, target)  # noqa: PTH105 - the layer sees this one at once


fsspec.register_implementation(PROTOCOL, Store, clobber=True)
