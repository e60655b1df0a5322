"""A failing case on its own: a directory with all it takes to see it fail again.

It holds a `config.json` and a `replay.json` that names the check, the layout and the seed of the
weights, which are drawn anew. Nothing else of the run that found it is needed.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from bridge.errors import ConfigError
from bridge.strict_json import parse_json
from harness.bench import Bench, Subject
from harness.checks import CHECKS
from harness.errors import SuiteError
from harness.layouts import check_layout_name
from harness.runner import Result, run_case
from harness.suite import DEVICES, DTYPES, LAYERS, ON_CPU, PROBES, Case, Compute

SCHEMA_VERSION: Final = 1
MODEL_NAME: Final = "replayed"
_SHARD_BYTES: Final = 1 << 15
"""Small enough for most small models to have an index and several files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A check, and what it runs on besides the configuration.

    Args:
        check: Name in `harness.checks`.
        layout: As suites name it; None where the check has no layout.
        probe: `short` or `long`; None where the check has no probe.
        dtype: What to compute in.
        seed: Of the weights.
        device: `cpu` or `cuda`.
        layers: One of `harness.suite.LAYERS`.

    Raises:
        SuiteError: HN101, anything that no case can have; all of it in one error.
    """

    check: str
    layout: str | None = None
    probe: str | None = None
    dtype: str = "float32"
    seed: int = 0
    device: str = "cpu"
    layers: str = "local"

    def __post_init__(self) -> None:
        """Names are known, and axes are given exactly where the check has them."""
        wrong = []
        if self.check not in CHECKS:
            raise SuiteError(
                f"no check is called {self.check!r}", hint=f"known: {', '.join(CHECKS)}"
            )
        for axis, value in (("layout", self.layout), ("probe", self.probe)):
            if (value is not None) != (axis in CHECKS[self.check].axes):
                wrong.append(f"{self.check} {'has no' if value else 'needs a'} {axis}")
        for name, value, known in (
            ("dtype", self.dtype, DTYPES),
            ("device", self.device, DEVICES),
            ("layers", self.layers, LAYERS),
            ("probe", self.probe, (None, *PROBES)),
        ):
            if value not in known:
                wrong.append(f"{name}={value!r} is not one of {', '.join(map(str, known))}")
        if type(self.seed) is not int or self.seed < 0:
            wrong.append(f"seed={self.seed!r} is not a count")
        if wrong:
            raise SuiteError("a replay that makes no sense", where=wrong)
        if self.layout is not None:
            check_layout_name(self.layout)

    @property
    def case(self) -> Case:
        """The case it runs."""
        compute = Compute(dtype=self.dtype, device=self.device, layers=self.layers)
        return compute.case(self.check, MODEL_NAME, layout=self.layout, probe=self.probe)


def replay_on(
    layout: str, check: str, *, seed: int, probe: str = "long", compute: Compute = ON_CPU
) -> Replay:
    """A replay of a check that may or may not have a layout and a probe."""
    axes = CHECKS[check].axes
    return Replay(
        check=check,
        layout=layout if "layout" in axes else None,
        probe=probe if "probe" in axes else None,
        dtype=compute.dtype,
        seed=seed,
        device=compute.device,
        layers=compute.layers,
    )


def write_model(config: Mapping[str, Any], directory: Path, *, seed: int) -> Path:
    """Write a configuration and its pseudo-random weights as a Hugging Face checkpoint.

    Args:
        config: The parsed `config.json`.
        directory: Created; must not exist.
        seed: Of the weights.

    Returns:
        The directory.
    """
    from bridge.storage.synthetic import synthesize
    from bridge.transfer import TransferLimits

    directory.parent.mkdir(parents=True, exist_ok=True)
    source = directory.with_name(f"{directory.name}.config.json")
    source.write_text(_json(config), "utf-8")
    synthesize(
        source,
        directory,
        seed=seed,
        max_shard_size=_SHARD_BYTES,
        limits=TransferLimits(),
    )
    source.unlink()
    return directory


def run_replay(config: Mapping[str, Any], replay: Replay, bench: Bench) -> Result:
    """Write the model, run the check on it, and leave nothing behind.

    Args:
        config: The parsed `config.json`.
        replay: What to run.
        bench: Whose ranks, fault and limits are used; its own models are not touched.
    """
    root = Path(tempfile.mkdtemp(prefix="replay-", dir=bench.workdir))
    try:
        # Two levels down: conversions lie in the working directory, and are named by the parent.
        path = write_model(config, root / "model" / "hf", seed=replay.seed)
        subjects = {MODEL_NAME: Subject(name=MODEL_NAME, hf=path)}
        return run_case(replay.case, bench.beside(root, subjects))
    finally:
        shutil.rmtree(root, ignore_errors=True)


def save_replay(
    directory: Path, config: Mapping[str, Any], replay: Replay, *, summary: str = ""
) -> str:
    """Write a failing case down.

    Args:
        directory: Created; files of the same names in it are replaced.
        config: The parsed `config.json`.
        replay: What fails on it.
        summary: What was found, for people.

    Returns:
        The command that runs it again.
    """
    directory.mkdir(parents=True, exist_ok=True)
    document = {"schema_version": SCHEMA_VERSION, **asdict(replay), "found": summary}
    (directory / "config.json").write_text(_json(config), "utf-8")
    (directory / "replay.json").write_text(_json(document), "utf-8")
    return f"nemotron-bridge replay {directory}"


def load_replay(directory: Path) -> tuple[dict[str, Any], Replay]:
    """Read what `save_replay` wrote: the configuration, and what to run on it.

    Raises:
        ConfigError: BR1xx, `config.json` is not there or no configuration.
        SuiteError: HN101, `replay.json` is not there or makes no sense.
    """
    from bridge.hf_config import load_hf_config

    path = directory / "replay.json"
    try:
        document = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise SuiteError(
            "no replay.json in this directory",
            where=str(directory),
            hint="give the directory that a failed run has printed",
        ) from None
    except (OSError, ValueError) as error:
        raise SuiteError(f"not a replay: {error}", where=str(path)) from None
    if not isinstance(document, dict) or document.pop("schema_version", None) != SCHEMA_VERSION:
        raise SuiteError(f"schema_version must be {SCHEMA_VERSION}", where=str(path))
    document.pop("found", None)
    try:
        replay = Replay(**document)
    except TypeError as error:
        raise SuiteError(f"not a replay: {error}", where=str(path)) from None
    config = load_hf_config(directory)
    if not config:
        raise ConfigError("the configuration is empty", where=str(directory))
    return config, replay


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(dict(document), indent=2) + "\n"
