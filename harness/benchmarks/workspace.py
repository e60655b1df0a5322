"""Where the checkpoints lie that are measured with, and how they are made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bridge.errors import UsageError
from harness.benchmarks.page_cache import files_of
from harness.benchmarks.process import OURS, Run, run
from harness.benchmarks.profile import Profile

_ELEMENT: Final = 2  # bytes of a bfloat16
_LAYERS_SHARE: Final = 0.75
"""Of the bytes, about; the rest is embedding and output layer, so that all sizes are alike."""

_MODEL: Final = "Llama-3.1-Nemotron-Nano-8B-v1"


class SetUpError(Exception):
    """What is to be measured could not be made. A group that meets it is reported as failed."""


def variant(name: str) -> Path:
    """A published configuration."""
    from harness.locations import suites_dir

    return suites_dir() / "variants" / f"{name}.json"


def config_of_size(nbytes: int) -> dict[str, Any]:
    """Nano-8B's dimensions with as many layers, and as much of its vocabulary, as the size wants.

    One layer has 436 MB, so half a gigabyte is the least.
    """
    config: dict[str, Any] = json.loads(variant(_MODEL).read_text("utf-8"))
    hidden, width = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] + config["num_key_value_heads"]
    layer = 2 * heads * config["head_dim"] * hidden + 3 * width * hidden + 2 * hidden
    elements = nbytes // _ELEMENT
    layers = max(1, round(_LAYERS_SHARE * elements / layer))
    rows = (elements - layers * layer - hidden) // (2 * hidden) // 128 * 128
    if rows < 128:
        raise UsageError(f"a checkpoint of {nbytes} bytes is too small for these dimensions")
    config["num_hidden_layers"] = layers
    config["vocab_size"] = min(config["vocab_size"], rows)
    return config


@dataclass(slots=True)
class Workspace:
    """One directory on one file system; all commands of a run work in it.

    Args:
        directory: Empty, and removed by who made it.
        profile: What is measured.
        say: Told what is going on, a line at a time.
        peer_python: The interpreter that Megatron-Bridge is installed in, perhaps.
        found: What trials have found that several groups hold theirs against, by trial.
    """

    directory: Path
    profile: Profile
    say: Callable[[str], None]
    peer_python: str = OURS[0]
    found: dict[str, Any] = field(default_factory=dict)
    _made: set[Path] = field(default_factory=set)

    def config(self, size: int) -> Path:
        """A `config.json` for a checkpoint of about this many bytes."""
        path = self.directory / f"config-{size}.json"
        if not path.is_file():
            path.write_text(json.dumps(config_of_size(size)), "utf-8")
        return path

    def hf(self, size: int) -> Path:
        """A Hugging Face checkpoint of about this many bytes, made when first asked for."""
        target = self.directory / f"hf-{size}"
        if target in self._made:
            return target
        return self._make(target, "synthesize", "--config", self.config(size), "--hf-path", target)

    def megatron(self, size: int) -> Path:
        """The same in Megatron's format."""
        target = self.directory / f"megatron-{size}"
        return self._make(
            target, "import", "--hf-model", self.hf(size), "--megatron-path", target,
            "--verify", "none",
        )  # fmt: skip

    def toy(self) -> Path:
        """A checkpoint so small that converting it is all start-up."""
        target = self.directory / "toy"
        return self._make(target, "toy", "nano-4b", "--hf-path", target)

    def release(self, size: int) -> None:
        """Remove the checkpoints of a size that nothing else is measured with."""
        if size != self.profile.main_size:
            for kind in ("hf", "megatron"):
                path = self.directory / f"{kind}-{size}"
                self._made.discard(path)
                shutil.rmtree(path, ignore_errors=True)

    def run(self, command: Sequence[str | Path], *, tree: bool = False) -> Run:
        """Run a command within the time limit."""
        return run(command, timeout=self.profile.timeout, tree=tree)

    def _make(self, target: Path, *arguments: str | Path) -> Path:
        if target not in self._made:
            self.say(f"making {target.name}")
            found = self.run([*OURS, *arguments])
            if found.failure:
                with suppress(FileNotFoundError):
                    shutil.rmtree(target)
                raise SetUpError(f"cannot make {target.name}: {found.failure}")
            self._made.add(target)
        return target


def size_of(directory: Path) -> int:
    """Bytes of all files below."""
    return sum(path.stat().st_size for path in files_of(directory))


def check_space(directory: Path, needed: int) -> None:
    """Refuse a disk that would run full, before hours of work do.

    Raises:
        UsageError: BR001, it lacks room.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UsageError(
            f"{needed / 1e9:.0f} GB are needed and {free / 1e9:.0f} GB are free",
            where=str(directory),
            hint="give --workdir a directory on a larger disk, or measure with --quick",
        )
