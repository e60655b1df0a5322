"""Read every file of a directory with plain `read`, into a few buffers of host memory.

python -m harness.benchmarks.trial_read DIRECTORY THREADS
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from harness.benchmarks.page_cache import files_of

_PIECE: Final = 4 << 20
"""Bytes of one `read`, as direct load has it."""


def main(directory: Path, threads: int) -> None:
    """Print one JSON document: seconds and bytes."""
    pieces = [
        (path, start)
        for path in files_of(directory)
        for start in range(0, path.stat().st_size, _PIECE)
    ]
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        # Neighbours go to different threads, so that each file is read forwards.
        nbytes = sum(pool.map(_read, [pieces[first::threads] for first in range(threads)]))
    sys.stdout.write(json.dumps({"read_seconds": time.perf_counter() - started, "nbytes": nbytes}))


def _read(pieces: Sequence[tuple[Path, int]]) -> int:
    """Bytes read: a file that has become shorter has fewer."""
    buffer, nbytes = bytearray(_PIECE), 0
    for path, start in pieces:
        with path.open("rb", buffering=0) as file:
            nbytes += os.preadv(file.fileno(), [buffer], start)
    return nbytes


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
