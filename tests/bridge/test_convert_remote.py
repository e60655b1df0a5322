"""Conversions from and to URLs: the bytes of a local one, visible whole or not at all."""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from bridge.conversion import ConversionOptions
from bridge.convert import export_checkpoint, import_checkpoint
from bridge.crew.launch import crew_of
from bridge.errors import (
    CheckpointError,
    CorruptFileError,
    TargetExistsError,
    UsageError,
    VerificationError,
)
from bridge.record import RECORD_NAME
from bridge.storage.megatron import MegatronSource
from bridge.storage.remote import Location, parse_location
from bridge.storage.remote_target import MARKER_NAME
from bridge.storage.safetensors import INDEX_NAME
from bridge.storage.synthetic import synthesize
from bridge.storage.target import MANIFEST_NAME
from bridge.storage.torch_dist_config import TRACKER_NAME
from bridge.tiling import Box
from bridge.transfer import TransferLimits
from harness.toys import toy_named, write_checkpoint
from tests.directories import files_of

Store: TypeAlias = Any
Call: TypeAlias = Any
"""Those of `conftest`, which no test can import."""

TARGET = "store://bucket/out"
CUT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}


def below(store: Store, prefix: str) -> dict[str, bytes]:
    """Every object below a prefix, with its bytes; but the manifest, as in `files_of`."""
    return {
        name.removeprefix(f"{prefix}/"): data
        for name, data in store.files().items()
        if name.startswith(f"{prefix}/") and not name.endswith(MANIFEST_NAME)
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, of five files with every side file; `megatron`, its import, of four files."""
    root = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(toy_named("super-49b-v1"), root / "hf", dtype="bfloat16")
    import_checkpoint(root / "hf", root / "megatron", **CUT)  # type: ignore[arg-type]
    return root


@pytest.fixture
def stored(store: Store, checkpoints: Path) -> Store:
    """Both in the store."""
    store.fill({f"bucket/{name}": data for name, data in files_of(checkpoints).items()})
    return store


Convert: TypeAlias = Callable[..., None]


def imported(checkpoints: Path, target: Location, options: ConversionOptions | None = None) -> None:
    """From local files."""
    import_checkpoint(checkpoints / "hf", target, options=options, **CUT)  # type: ignore[arg-type]


def exported(checkpoints: Path, target: Location, options: ConversionOptions | None = None) -> None:
    """From local files."""
    export_checkpoint(checkpoints / "megatron", target, options=options)


BOTH = pytest.mark.parametrize(
    ("convert", "result", "visible"),
    [
        (imported, "megatron", {TRACKER_NAME}),
        (exported, "hf", {INDEX_NAME, "config.json"}),
    ],
    ids=["import", "export"],
)


def test_an_import_from_a_url_is_that_of_the_directory(
    stored: Store, checkpoints: Path, tmp_path: Path
) -> None:
    """Record, side files and all."""
    del stored
    import_checkpoint(parse_location("store://bucket/hf"), tmp_path / "out", **CUT)  # type: ignore[arg-type]
    assert files_of(checkpoints / "megatron") == files_of(tmp_path / "out")
    manifests = {
        (at / MANIFEST_NAME).read_bytes() for at in (checkpoints / "megatron", tmp_path / "out")
    }
    assert len(manifests) == 1


@pytest.mark.parametrize("place", ["megatron", "megatron/iter_0000000"])
def test_an_export_from_a_url_is_that_of_the_directory(
    stored: Store, checkpoints: Path, tmp_path: Path, place: str
) -> None:
    """From the root and from the iteration's own directory."""
    del stored
    export_checkpoint(parse_location(f"store://bucket/{place}"), tmp_path / "out")
    assert files_of(checkpoints / "hf") == files_of(tmp_path / "out")


def test_a_manifest_does_not_tell_where_the_source_was(
    stored: Store, checkpoints: Path, tmp_path: Path
) -> None:
    """Nor does it matter to who goes on: what is complete is so from either place."""
    del stored
    sources = checkpoints / "megatron", parse_location("store://bucket/megatron")
    for source, name in zip(sources, "ab", strict=True):
        export_checkpoint(source, tmp_path / name)
    assert (tmp_path / "a" / MANIFEST_NAME).read_bytes() == (
        tmp_path / "b" / MANIFEST_NAME
    ).read_bytes()
    for source in sources:
        for name in "ab":
            report = export_checkpoint(
                source, tmp_path / name, options=ConversionOptions(resume=True)
            )
            assert "nothing to do" in report.notes[0]


@BOTH
def test_what_is_written_to_a_url_is_what_is_written_to_a_directory(
    store: Store, checkpoints: Path, convert: Convert, result: str, visible: set[str]
) -> None:
    """Byte for byte, and nothing besides."""
    del visible
    convert(checkpoints, parse_location(TARGET))
    assert files_of(checkpoints / result) == below(store, "bucket/out")


def test_from_url_to_url(stored: Store, checkpoints: Path) -> None:
    """There and back again without a file here."""
    import_checkpoint(parse_location("store://bucket/hf"), parse_location(TARGET))
    export_checkpoint(parse_location(TARGET), parse_location("store://bucket/back"))
    assert files_of(checkpoints / "hf") == below(stored, "bucket/back")


def test_the_configuration_of_an_export_may_be_behind_a_url(
    stored: Store, checkpoints: Path, tmp_path: Path
) -> None:
    """A directory with the tokenizer, or a bare file."""
    shutil.copytree(checkpoints / "megatron", tmp_path / "trained")
    (tmp_path / "trained" / RECORD_NAME).unlink()
    for name, expected in (
        ("hf", {name for name in files_of(checkpoints / "hf") if "model" not in name}),
        ("hf/config.json", {"config.json"}),
    ):
        out = tmp_path / name.replace("/", "-")
        found = parse_location(f"store://bucket/{name}")
        export_checkpoint(tmp_path / "trained", out, hf_model=found)
        assert expected == {name for name in files_of(out) if "model" not in name}
        assert (out / "config.json").read_bytes() == stored.files()["bucket/hf/config.json"]


def test_a_synthetic_checkpoint_goes_to_a_url(
    store: Store, checkpoints: Path, tmp_path: Path
) -> None:
    """The same as to a directory; its configuration may come from one too."""
    store.fill({"bucket/config.json": (checkpoints / "hf" / "config.json").read_bytes()})
    for config, target in (
        (checkpoints / "hf" / "config.json", tmp_path / "out"),
        (parse_location("store://bucket/config.json"), parse_location(TARGET)),
    ):
        synthesize(config, target, seed=3, max_shard_size=400_000, limits=TransferLimits())
    assert files_of(tmp_path / "out") == below(store, "bucket/out")


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_share_the_files_of_a_url(checkpoints: Path, tmp_path: Path, workers: int) -> None:
    """Each stages and uploads its own; `local://` is one disk for all of them."""
    (tmp_path / "staging").mkdir()
    options = ConversionOptions(staging=tmp_path / "staging")
    with crew_of(workers) as crew:
        crew.run(
            import_checkpoint,
            parse_location(f"local://{checkpoints}/hf"),
            parse_location(f"local://{tmp_path}/megatron"),
            options=options,
            **CUT,
        )
    with crew_of(workers) as crew:
        crew.run(
            export_checkpoint,
            parse_location(f"local://{tmp_path}/megatron"),
            parse_location(f"local://{tmp_path}/hf"),
            options=options,
        )
    for name in ("megatron", "hf"):
        assert files_of(checkpoints / name) == files_of(tmp_path / name)
    assert list((tmp_path / "staging").iterdir()) == []


class Watching:
    """Remembers the size of each phase, and what was done of it."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int, int]] = []

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """One phase."""
        done: list[int] = []
        yield done.append
        self.phases.append((name, total, sum(done)))


@BOTH
@pytest.mark.parametrize("url", [True, False])
def test_progress_comes_out_even(
    store: Store,
    checkpoints: Path,
    tmp_path: Path,
    convert: Convert,
    result: str,
    visible: set[str],
    *,
    url: bool,
) -> None:
    """The bar is full at the end; what is written, hashed and sent counts each time."""
    watching = Watching()
    target = parse_location(TARGET) if url else tmp_path / "out"
    convert(checkpoints, target, ConversionOptions(progress=watching))
    assert [name for name, _, _ in watching.phases] == ["convert", "verify"]
    (_, converted, _), (_, weights, _) = watching.phases
    assert [done for _, _, done in watching.phases] == [total for _, total, _ in watching.phases]
    # Towards Megatron what is written is hashed, from there what is read: by file and by tensor.
    passes = (2 if result == "megatron" else 3) + url
    assert passes * weights < converted < (passes + 0.9) * weights
    del store, visible


def test_each_byte_of_the_weights_is_asked_for_once(stored: Store) -> None:
    """Not the tensors of a file again for each of their parts."""
    import_checkpoint(
        parse_location("store://bucket/hf"),
        parse_location(TARGET),
        options=ConversionOptions(verify="none"),
    )
    spans = defaultdict[str, list[tuple[int, int]]](list)
    for call in stored.calls:
        if call.operation == "read" and call.path.endswith(".safetensors"):
            spans[call.path].append((call.start, call.stop))
    assert len(spans) == 5
    for path, ranges in spans.items():
        position = 0
        for start, stop in sorted(ranges):
            assert start == position, (path, ranges)
            position = stop
        assert position == len(stored.files()[path.lstrip("/")])


def test_a_parameter_takes_three_requests_a_record(stored: Store) -> None:
    """The two ends of the record, which say where the elements are, and the elements."""
    with MegatronSource(parse_location("store://bucket/megatron")) as source:
        name = "decoder.layers.3.mlp.linear_fc2.weight"
        info = source.tensors[name]
        expected = np.empty(info.shape, info.dtype.word)
        stored.calls.clear()
        source.read_into(name, Box.whole(info.shape), expected)
        read = [call for call in stored.calls if call.operation == "read"]
    assert len(read) == 3 * CUT["tensor_model_parallel_size"]
    assert len(set(read)) == len(read)


@BOTH
@pytest.mark.parametrize("number", [2, 5, 9, 14, -5, -2, -1])
def test_a_failing_backend_leaves_nothing(
    store: Store, checkpoints: Path, convert: Convert, result: str, visible: set[str], number: int
) -> None:
    """Whichever request fails, counted from the first or the last; the next attempt succeeds."""
    convert(checkpoints, parse_location(TARGET))
    num_calls = len(store.calls)
    store.clear()

    def fail_once(_: Call) -> None:
        if len(store.calls) == number % num_calls + 1:
            raise OSError(errno.ECONNRESET, "reset by peer")

    store.trouble = staticmethod(fail_once)
    with pytest.raises(CheckpointError, match="reset by peer"):
        convert(checkpoints, parse_location(TARGET))
    assert store.files() == {}
    convert(checkpoints, parse_location(TARGET))
    assert files_of(checkpoints / result) == below(store, "bucket/out")
    del visible


@BOTH
def test_what_a_kill_leaves_is_no_checkpoint_and_no_obstacle(
    store: Store, checkpoints: Path, convert: Convert, result: str, visible: set[str]
) -> None:
    """Before the first of the visible files goes up: all others are there, with their marker."""
    left: dict[str, bytes] = {}

    def remember(call: Call) -> None:
        if call.operation == "write" and call.path.rpartition("/")[2] in visible and not left:
            left.update(store.files())

    store.trouble = staticmethod(remember)
    convert(checkpoints, parse_location(TARGET))
    everything = {f"bucket/out/{name}" for name in [*files_of(checkpoints / result), MANIFEST_NAME]}
    names = {f"bucket/out/{name}" for name in visible}
    assert {*everything, f"bucket/out/{MARKER_NAME}"} - names == set(left)
    store.clear()
    store.fill(left)
    convert(checkpoints, parse_location(TARGET))
    assert files_of(checkpoints / result) == below(store, "bucket/out")


def test_a_process_that_is_killed_leaves_no_checkpoint_and_no_obstacle(
    checkpoints: Path, tmp_path: Path
) -> None:
    """Really killed, in the middle of its second upload; the staged file goes later too."""
    code = (
        "import os, signal, sys, pathlib\n"
        "from bridge.conversion import ConversionOptions\n"
        "from bridge.convert import export_checkpoint\n"
        "from bridge.storage import remote_target\n"
        "from bridge.storage.remote import parse_location\n"
        "upload, done = remote_target.upload, []\n"
        "def dying(file, path, **kwargs):\n"
        "    if done:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    done.append(upload(file, path, **kwargs))\n"
        "remote_target.upload = dying\n"
        "export_checkpoint(pathlib.Path(sys.argv[1]), parse_location(sys.argv[2]),\n"
        "    options=ConversionOptions(staging=pathlib.Path(sys.argv[3])))\n"
    )
    target, staging = parse_location(f"local://{tmp_path}/out"), tmp_path / "staging"
    staging.mkdir()
    run = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", code, str(checkpoints / "megatron"), f"local://{tmp_path}/out",
         str(staging)],
        check=False,
    )  # fmt: skip
    assert run.returncode == -signal.SIGKILL
    left = files_of(tmp_path / "out")
    assert MARKER_NAME in left
    assert len(left) == 2
    assert len(list(staging.iterdir())) == 1
    options = ConversionOptions(staging=staging)
    export_checkpoint(checkpoints / "megatron", target, options=options)
    assert files_of(checkpoints / "hf") == files_of(tmp_path / "out")
    assert list(staging.iterdir()) == []


def test_a_short_read_is_a_damaged_file(stored: Store, tmp_path: Path) -> None:
    """The backend gives less than it was asked for."""

    def shorten(call: Call) -> None:
        stored.short = int(call.start is not None and call.stop - call.start > 100_000)

    stored.trouble = staticmethod(shorten)
    with pytest.raises(CorruptFileError, match="1 bytes early") as caught:
        import_checkpoint(parse_location("store://bucket/hf"), tmp_path / "out")
    assert caught.value.where[0].startswith("store:///bucket/hf/model-0000")
    assert list(tmp_path.iterdir()) == []


@BOTH
def test_a_bit_that_turns_over_on_the_way_is_found(
    store: Store, checkpoints: Path, convert: Convert, result: str, visible: set[str]
) -> None:
    """What is read back is what the store holds, not what was staged."""
    done: list[str] = []

    def damage(call: Call) -> None:
        uploaded = [name for name in store.store if name.endswith((".distcp", ".safetensors"))]
        if call.operation == "write" and uploaded and not done:
            done.append(uploaded[0])
            data = bytearray(store.store[uploaded[0]].getvalue())
            data[len(data) // 2] ^= 1
            store.store[uploaded[0]].seek(0)
            store.store[uploaded[0]].write(bytes(data))

    store.trouble = staticmethod(damage)
    with pytest.raises(VerificationError):
        convert(checkpoints, parse_location(TARGET))
    assert len(done) == 1
    assert store.files() == {}
    del result, visible


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_existing_target_stays(stored: Store, checkpoints: Path, *, overwrite: bool) -> None:
    """With --overwrite too."""
    before = stored.files()
    with pytest.raises(TargetExistsError):
        import_checkpoint(
            checkpoints / "hf",
            parse_location("store://bucket/megatron"),
            options=ConversionOptions(overwrite=overwrite),
        )
    assert before == stored.files()


@pytest.mark.parametrize("target", ["store://bucket/hf", "store://bucket/hf/in", "store://bucket"])
def test_source_and_target_are_not_one_inside_the_other(stored: Store, target: str) -> None:
    """Behind URLs as well."""
    before = stored.files()
    with pytest.raises(UsageError, match="one inside the other"):
        import_checkpoint(parse_location("store://bucket/hf"), parse_location(target))
    assert before == stored.files()


def test_a_directory_is_the_same_by_whichever_name(checkpoints: Path, tmp_path: Path) -> None:
    """A path, a link to it, and its URL."""
    (tmp_path / "link").symlink_to(checkpoints)
    for target in (f"local://{checkpoints}/hf/in", f"local://{tmp_path}/link/hf/in"):
        with pytest.raises(UsageError, match="one inside the other"):
            import_checkpoint(checkpoints / "hf", parse_location(target))


def test_staging_for_a_target_that_needs_none_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    """Rather than ignored."""
    with pytest.raises(UsageError, match="staging directory is for a target behind a URL"):
        import_checkpoint(
            checkpoints / "hf", tmp_path / "out", options=ConversionOptions(staging=tmp_path)
        )
    assert list(tmp_path.iterdir()) == []
