"""The conversions that are tortured: command lines as data, their sources, and what is right."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from harness.errors import TortureError
from harness.torture.store import BUCKET, PROTOCOL
from harness.torture.warm import Ended, Job, Warm

TARGET: Final = "out"
_PAGE: Final = 4096
_LAST: Final = {
    "import": ("latest_checkpointed_iteration.txt",),
    "export": ("config.json",),
}
"""Without these no loader takes a directory for a checkpoint of that kind."""

State = Literal["absent", "old", "complete", "wrong"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A toy that conversions start from.

    Args:
        toy: Its name.
        dtype: Of the weights.
        shard_nbytes: Of a file: small, so that there are many.
        ranks: TP and PP of its Megatron checkpoint.
    """

    toy: str
    dtype: str = "bfloat16"
    shard_nbytes: int = 400_000
    ranks: tuple[int, int] = (2, 2)

    @property
    def name(self) -> str:
        """Of its directories."""
        return f"{self.toy}-{self.dtype}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A command that is to survive.

    Args:
        name: Part of the ids of its trials.
        command: `import` or `export`.
        source: What it converts.
        flags: Beside the two paths.
        overwrites: The target is there already, another model.
        where: Its target is a path, a `file://` URL, or an object store.
    """

    name: str
    command: Literal["import", "export"]
    source: Source
    flags: tuple[str, ...] = ()
    overwrites: bool = False
    where: Literal["path", "file", "store"] = "path"

    @property
    def workers(self) -> int:
        """Processes that it consists of."""
        return (
            int(self.flags[self.flags.index("--workers") + 1]) if "--workers" in self.flags else 1
        )

    def arguments(self, sources: Path, place: Path, *, resume: bool = False) -> list[str]:
        """The command line, for a target in a directory."""
        source = str(
            sources / ("hf" if self.command == "import" else "megatron") / self.source.name
        )
        target = str(self.target(place))
        if self.where != "path":
            target = f"{'file' if self.where == 'file' else PROTOCOL}://{target}"
        paths = (
            ["--hf-model", source, "--megatron-path", target]
            if self.command == "import"
            else ["--megatron-path", source, "--hf-path", target]
        )
        overwrite = ["--overwrite"] if self.overwrites else []
        again = ["--resume"] if resume else []
        return [self.command, *paths, "--verify", "bits", *self.flags, *overwrite, *again]

    def target(self, place: Path) -> Path:
        """Where the target is on the disk."""
        return place / BUCKET / TARGET if self.where == "store" else place / TARGET

    @property
    def last(self) -> tuple[str, ...]:
        """Files that make a checkpoint of the others."""
        return _LAST[self.command]


_TIED = Source(toy="tied")
_PUZZLE = Source(toy="puzzle")
_51B = Source(toy="51b", shard_nbytes=200_000)
_NANO = Source(toy="nano-4b", dtype="float32", ranks=(2, 1))
_SUPER = Source(toy="super-49b-v1")
_CUT = ("--tp", "2", "--pp", "2")

SCENARIOS: Final = {
    one.name: one
    for one in (
        Scenario(name="import", command="import", source=_TIED, flags=_CUT),
        Scenario(
            name="import-over", command="import", source=_51B, flags=("--pp", "3"), overwrites=True
        ),
        Scenario(
            name="import-dtype", command="import", source=_NANO,
            flags=("--tp", "2", "--dtype", "bfloat16"),
        ),
        Scenario(name="import-url", command="import", source=_PUZZLE, flags=_CUT, where="file"),
        Scenario(name="import-store", command="import", source=_SUPER, flags=_CUT, where="store"),
        Scenario(name="export", command="export", source=_SUPER),
        Scenario(
            name="export-over", command="export", source=_51B,
            flags=("--max-shard-size", "250KB"), overwrites=True,
        ),
        Scenario(
            name="export-dtype", command="export", source=_TIED,
            flags=("--dtype", "float32", "--max-shard-size", "600KB"),
        ),
        Scenario(name="export-store", command="export", source=_PUZZLE, where="store"),
        Scenario(
            name="import-workers", command="import", source=_TIED, flags=(*_CUT, "--workers", "2")
        ),
        Scenario(
            name="export-workers", command="export", source=_51B,
            flags=("--workers", "2", "--max-shard-size", "250KB"), overwrites=True,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A scenario that was run unhurt.

    Args:
        old: What lies where the target goes, by name; empty where nothing does.
        right: What the target is to be, by name: sha256 of files, and directories.
        calls: What it did: `w` or `r`, the function, the path within the place.
        old_nbytes: That `old` takes on the disk.
        nbytes: That `right` does.
        seconds: It took.
    """

    scenario: Scenario
    old: Mapping[str, str]
    right: Mapping[str, str]
    calls: Sequence[tuple[str, str, str]]
    old_nbytes: int
    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """The directory that trials take place in.

    Args:
        root: Holds the sources, the logs and the trials.
    """

    root: Path

    @property
    def sources(self) -> Path:
        """What is converted; nothing may change it."""
        return self.root / "sources"

    def trial(self, name: str) -> Path:
        """A directory for a trial, with an empty place for its target."""
        directory = self.root / name.replace("/", "-")
        (directory / "tmp").mkdir(parents=True)
        (directory / "place" / BUCKET).mkdir(parents=True)
        return directory

    def lay_old(self, scenario: Scenario, place: Path) -> None:
        """Put another checkpoint where the target goes, if the scenario overwrites one."""
        if scenario.where != "store":
            (place / BUCKET).rmdir()
        if scenario.overwrites:
            kind = "megatron" if scenario.command == "import" else "hf"
            shutil.copytree(self.root / "old" / kind / scenario.source.name, scenario.target(place))

    def job(
        self,
        scenario: Scenario,
        directory: Path,
        run: int,
        *,
        fault: str = "",
        resume: bool = False,
    ) -> Job:
        """The command of a trial, its `run`th."""
        return Job(
            arguments=scenario.arguments(self.sources, directory / "place", resume=resume),
            directory=str(directory),
            sources=[str(self.sources)],
            log=str(self.root / "logs" / f"{directory.name}-{run}"),
            fault=fault,
        )

    def make(self, scenarios: Sequence[Scenario], warm: Warm) -> None:
        """Write every source that the scenarios need, and the checkpoints that are overwritten."""
        from harness.toys import toy_named, write_checkpoint

        (self.root / "logs").mkdir()
        for source in {one.source.name: one.source for one in scenarios}.values():
            for seed, below in enumerate((self.sources, self.root / "old")):
                hf, megatron = below / "hf" / source.name, below / "megatron" / source.name
                write_checkpoint(
                    toy_named(source.toy),
                    hf,
                    dtype=source.dtype,
                    seed=seed,
                    max_shard_size=source.shard_nbytes,
                )
                cut = Scenario(
                    name=f"make-{source.name}-{seed}", command="import", source=source,
                    flags=("--tp", str(source.ranks[0]), "--pp", str(source.ranks[1])),
                )  # fmt: skip
                directory = self.trial(cut.name)
                job = self.job(cut, directory, 0)
                arguments = cut.arguments(below, megatron.parent)
                megatron.parent.mkdir(parents=True, exist_ok=True)
                arguments[arguments.index("--megatron-path") + 1] = str(megatron)
                _require(warm.run(Job(
                    arguments=arguments, directory=job.directory, sources=[], log=job.log
                )), arguments)  # fmt: skip
                shutil.rmtree(directory)

    def prepare(self, scenario: Scenario, warm: Warm) -> Prepared:
        """Run a scenario unhurt, and see what it does and makes.

        Raises:
            TortureError: HN206, it fails.
        """
        directory = self.trial(f"clean-{scenario.name}-{uuid.uuid4().hex}")
        place = directory / "place"
        self.lay_old(scenario, place)
        old, old_nbytes = contents(scenario.target(place)), nbytes_below(scenario.target(place))
        job = self.job(scenario, directory, 0)
        ended = _require(warm.run(job), job.arguments)
        right, nbytes = contents(scenario.target(place)), nbytes_below(scenario.target(place))
        calls = [
            (kind, name, os.path.relpath(path, self.root))
            for kind, name, path in ended.seen["events"]
        ]
        shutil.rmtree(directory)
        return Prepared(
            scenario=scenario,
            old=old,
            right=right,
            calls=calls,
            old_nbytes=old_nbytes,
            nbytes=nbytes,
            seconds=ended.seconds,
        )


def contents(directory: Path) -> dict[str, str]:
    """What is below a directory: sha256 of each file, `/` of each directory; nothing if absent."""
    if not os.path.lexists(directory):
        return {}
    found = {".": "/" if directory.is_dir() else "file"}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        else:
            found[name] = "/" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def nbytes_below(directory: Path) -> int:
    """Bytes that the files below a directory take on a disk, in whole pages."""
    sizes = [path.stat().st_size for path in directory.rglob("*") if path.is_file()]
    return sum(-(-size // _PAGE) * _PAGE for size in sizes)


def _require(ended: Ended, arguments: Sequence[Any]) -> Ended:
    if ended.code != 0:
        raise TortureError(
            f"a command fails though nothing is done to it (exit code {ended.code})",
            where=f"nemotron-bridge {' '.join(map(str, arguments))}",
            hint=ended.err.strip()[-2000:] or "it says nothing",
        )
    return ended
