"""The process of `harness.torture.soak`: `python -m harness.torture.soaking ROOT COUNT`."""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path
from typing import Final, NamedTuple

import psutil

from harness.torture.soak import Sample
from harness.torture.warm import load_all

_SHARED: Final = Path("/dev/shm")  # noqa: S108 - it is looked at


class _Turn(NamedTuple):
    """One command of the rotation.

    Args:
        what: It is.
        arguments: Of the command.
        makes: What it writes, removed before the next turn that does.
        code: What it is to exit with.
    """

    what: str
    arguments: tuple[str, ...]
    makes: str = ""
    code: int = 0


def main() -> None:
    """Convert, verify and fail in turns; a line of JSON after each."""
    root, count = Path(sys.argv[1]), int(sys.argv[2])
    load_all(("torch", "harness.cli", "bridge.convert", "harness.torture.store", *sys.argv[3:]))
    _sources(root)
    out = os.dup(1)
    before = set(_shared())
    for turn in islice(cycle(_turns(root)), count):
        if turn.makes:
            shutil.rmtree(root / turn.makes, ignore_errors=True)
        code = _run(turn.arguments)
        gc.collect()
        process = psutil.Process()
        sample = Sample(
            what=turn.what,
            code=code,
            expected=turn.code,
            rss=process.memory_info().rss,
            files=process.num_fds(),
            threads=process.num_threads(),
            temporary=len(os.listdir(tempfile.gettempdir())),  # noqa: PTH208 - a number
            shared=len(_unused(set(_shared()) - before)),
            # multiprocessing keeps one, which watches over what the others might leave.
            children=sum("tracker" not in " ".join(one.cmdline()) for one in process.children()),
        )
        os.write(out, json.dumps(asdict(sample)).encode() + b"\n")


def _sources(root: Path) -> None:
    from harness.toys import toy_named, write_checkpoint

    write_checkpoint(toy_named("tied"), root / "hf", dtype="bfloat16", max_shard_size=400_000)
    shutil.copytree(root / "hf", root / "damaged")
    weights = max((root / "damaged").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    os.truncate(weights, weights.stat().st_size - 1)


def _turns(root: Path) -> list[_Turn]:
    """The rotation: both directions, kinds of target, manifests, failures, several processes."""
    hf, megatron, damaged = (str(root / name) for name in ("hf", "megatron", "damaged"))
    bits = ("--verify", "bits")
    cut = ("--tp", "2", "--pp", "2")
    store = f"torture://{root}/bucket/out"
    plain = [
        _Turn("import", ("import", "--hf-model", hf, "--megatron-path", megatron, *cut, *bits),
              "megatron"),
        _Turn("export", ("export", "--megatron-path", megatron, "--hf-path", str(root / "back"),
                         *bits), "back"),
        _Turn("verify --manifest of an import", ("verify", "--manifest", megatron)),
        _Turn("import, rounded", ("import", "--hf-model", hf, "--megatron-path",
                                  str(root / "rounded"), "--dtype", "float16", "--allow-overflow",
                                  *bits), "rounded"),
        _Turn("export, over another", ("export", "--megatron-path", megatron, "--hf-path",
                                       str(root / "back"), "--overwrite", *bits)),
        _Turn("verify --manifest of an export", ("verify", "--manifest", str(root / "back"))),
        _Turn("import into a store", ("import", "--hf-model", hf, "--megatron-path", store, *bits),
              "bucket/out"),
        _Turn("verify --manifest of a store", ("verify", "--manifest", store)),
        _Turn("verify --manifest of none", ("verify", "--manifest", hf), code=2),
        _Turn("import of damaged weights", ("import", "--hf-model", damaged, "--megatron-path",
                                            str(root / "none"), *bits), code=2),
        _Turn("export onto what is there", ("export", "--megatron-path", megatron, "--hf-path", hf,
                                            *bits), code=2),
    ]  # fmt: skip
    workers = _Turn(
        "import by two processes",
        ("import", "--hf-model", hf, "--megatron-path", str(root / "shared"), *cut, *bits,
         "--workers", "2"),
        "shared",
    )  # fmt: skip
    return [*plain, *plain, *plain, workers]


def _run(arguments: tuple[str, ...]) -> int:
    from harness.cli import main as command

    sys.argv = ["nemotron-bridge", *arguments]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            command()
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _shared() -> list[str]:
    return os.listdir(_SHARED) if _SHARED.is_dir() else []  # noqa: PTH208 - names


def _unused(names: set[str]) -> set[str]:
    """Those that no living process has mapped: others on this machine make and hold theirs."""
    if not names:
        return names
    used = set()
    for process in psutil.process_iter():
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text("utf-8", errors="replace")
        except OSError:
            continue
        used |= {name for name in names if f"{_SHARED}/{name}" in maps}
    return names - used


if __name__ == "__main__":
    main()
