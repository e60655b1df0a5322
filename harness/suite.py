"""Suites: TOML files that say which checks run on which models, layouts, dtypes and probes.

Each `[[run]]` table is a product: every check x model x dtype, and where the check has them every
layout and probe. What a table leaves out it takes from `[defaults]`. A suite holds no limits: those
are in `thresholds.toml`.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bridge.errors import ConfigError
from bridge.megatron_config import choose_layers
from harness.checks import CHECKS
from harness.errors import SuiteError
from harness.golden.cases import PREFIX, golden_model
from harness.layouts import check_layout_name
from harness.locations import suites_dir
from harness.probes import CONTEXT_LENGTHS
from harness.toml_files import read_toml
from harness.toys import toy_named

SCHEMA_VERSION: Final = 1
PROBES: Final = ("short", "long")
"""What every model is run on; suites may also name one of `harness.probes.CONTEXT_LENGTHS`."""
DTYPES: Final = ("float32", "bfloat16")
DEVICES: Final = ("cpu", "cuda")
LAYERS: Final = ("local", "te", "te-unfused", "te-fused", "te-flash")
"""Megatron-Core's own layers, or Transformer Engine's and which attention of theirs."""
_LISTS: Final = ("checks", "models", "layouts", "dtypes", "probes", "layers")
_TOY: Final = "toy:"
_GOLDEN: Final = "golden:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One check on one model, at one point of the axes that the check has."""

    check: str
    model: str
    dtype: str
    layout: str | None = None
    probe: str | None = None
    device: str = "cpu"
    layers: str = "local"

    @property
    def id(self) -> str:
        """As `--select` and reports have it: `logits/super-49b-v1/tp2-pp1/float32/long`."""
        parts = (self.check, self.model, self.layout, self.dtype, self.probe)
        name = "/".join(part for part in parts if part is not None)
        name = name if self.device == "cpu" else f"{name}/{self.device}"
        return name if self.layers == "local" else f"{name}/{self.layers}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """What cases compute in, where, and by which layers."""

    dtype: str = "float32"
    device: str = "cpu"
    layers: str = "local"

    def case(
        self, check: str, model: str, *, layout: str | None = None, probe: str | None = None
    ) -> Case:
        """A case so computed. Layers are named only where there is a live model to have them."""
        return Case(
            check=check,
            model=model,
            dtype=self.dtype,
            layout=layout,
            probe=probe,
            device=self.device,
            layers=self.layers if forms_ranks(check) else "local",
        )


ON_CPU: Final = Compute()
"""In float32 by local layers: what runs everywhere."""


def layers_named(name: str, device: str) -> str:
    """One of `LAYERS`; "auto" are Transformer Engine's on a GPU where they are installed."""
    return choose_layers("auto", device) if name == "auto" else name


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A named list of cases."""

    name: str
    description: str
    cases: tuple[Case, ...]


def load_suite(name: str) -> Suite:
    """Read `suites/NAME.toml`, or a file by its path.

    Raises:
        SuiteError: HN101, no such suite, or anything in it that does not make sense; all of it in
            one error.
    """
    path = Path(name) if name.endswith(".toml") else suites_dir() / f"{name}.toml"
    try:
        document = read_toml(path)
    except FileNotFoundError:
        raise SuiteError(
            f"no suite {name!r}", where=str(path), hint=f"known: {', '.join(suite_names())}"
        ) from None
    except (OSError, ValueError) as error:
        raise SuiteError(f"not a suite: {error}", where=str(path)) from None
    return parse_suite(document, name=path.stem, where=str(path))


def suite_names() -> list[str]:
    """The suites that come with the project."""
    return sorted(
        path.stem for path in suites_dir().glob("*.toml") if "[[run]]" in path.read_text("utf-8")
    )


def parse_suite(document: Mapping[str, Any], *, name: str, where: str) -> Suite:
    """Turn a suite's document into cases, in the order of the file; raises as `load_suite`."""
    wrong: list[str] = []
    if document.get("schema_version") != SCHEMA_VERSION:
        wrong.append(f"schema_version must be {SCHEMA_VERSION}")
    unknown = sorted(document.keys() - {"schema_version", "description", "defaults", "run"})
    wrong += [f"unknown key {key}" for key in unknown]
    defaults, runs = document.get("defaults", {}), document.get("run", [])
    if not isinstance(defaults, dict) or not isinstance(runs, list) or not runs:
        raise SuiteError(
            "a suite has [[run]] tables and may have [defaults]", where=[where, *wrong]
        )
    wrong += _problems(defaults, "defaults")
    cases: list[Case] = []
    for number, run in enumerate(runs, start=1):
        place = f"run {number}"
        problems = _problems(run, place) if isinstance(run, dict) else [f"{place} is not a table"]
        if not problems:
            merged = {**defaults, **run}
            problems = [
                f"{place}: {key} is missing" for key in _needed(merged) if not merged.get(key)
            ]
            if not problems and not wrong:
                cases += _cases(merged)
        wrong += problems
    twice = {case.id for case, count in Counter(cases).items() if count > 1}
    wrong += [f"{case} comes twice" for case in sorted(twice)]
    if wrong:
        raise SuiteError(
            f"suite {name} makes no sense", where=[f"{where}: {problem}" for problem in wrong]
        )
    description = str(document.get("description", ""))
    return Suite(name=name, description=description, cases=tuple(cases))


def select(cases: Iterable[Case], patterns: Sequence[str]) -> list[Case]:
    """The cases that match any pattern: a glob over the whole id, or part of it.

    Raises:
        SuiteError: HN101, nothing is left: a run that checks nothing must not look like a success.
    """
    known = list(cases)
    if not patterns:
        found = known
    else:
        found = [case for case in known if any(_matches(case.id, one) for one in patterns)]
    if not found:
        near = ", ".join(case.id for case in known[:3])
        raise SuiteError(
            f"none of {len(known)} cases is selected by {', '.join(patterns) or 'the suite'}",
            hint=f"ids look like {near}; --list prints them" if near else None,
        )
    return found


def _matches(name: str, pattern: str) -> bool:
    if any(char in pattern for char in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return pattern in name


def _needed(run: Mapping[str, Any]) -> list[str]:
    axes = {axis for name in run.get("checks", ()) for axis in CHECKS[name].axes}
    return ["checks", "models", "dtypes", *sorted(f"{axis}s" for axis in axes)]


def _problems(table: Mapping[str, Any], place: str) -> list[str]:
    wrong = [f"{place}: unknown key {key}" for key in sorted(table.keys() - {*_LISTS, "device"})]
    for key in _LISTS:
        values = table.get(key, [])
        if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
            wrong.append(f"{place}: {key} must be a list of strings")
            continue
        wrong += [f"{place}: {problem}" for problem in _unknown(key, values)]
    if table.get("device", "cpu") not in DEVICES:
        wrong.append(f"{place}: device must be one of {', '.join(DEVICES)}")
    return wrong


def _unknown(key: str, values: Sequence[str]) -> Iterator[str]:
    probes = (*PROBES, *CONTEXT_LENGTHS)
    known = {"checks": tuple(CHECKS), "dtypes": DTYPES, "probes": probes, "layers": LAYERS}
    for value in values:
        if key in known:
            if value not in known[key]:
                yield f"{key}: {value!r} is not one of {', '.join(known[key])}"
            continue
        try:
            if key == "layouts":
                check_layout_name(value)
            elif value.startswith(_TOY):
                toy_named(value)
            elif value.startswith(_GOLDEN):
                golden_model(value.removeprefix(_GOLDEN))
            else:
                yield f"models: {value!r} must be {_TOY}NAME or {_GOLDEN}NAME"
        except (SuiteError, ConfigError) as error:
            yield f"{key}: {error.message}"


def _cases(run: Mapping[str, Any]) -> Iterator[Case]:
    for name, model, dtype in itertools.product(run["checks"], run["models"], run["dtypes"]):
        axes = CHECKS[name].axes
        layouts = run["layouts"] if "layout" in axes else (None,)
        probes = run["probes"] if "probe" in axes else (None,)
        kinds = run.get("layers", ("local",)) if forms_ranks(name) else ("local",)
        for layout, probe, layers in itertools.product(layouts, probes, kinds):
            compute = Compute(dtype=dtype, device=run.get("device", "cpu"), layers=layers)
            yield compute.case(
                name,
                model.removeprefix(_TOY).replace(_GOLDEN, PREFIX),
                layout=layout,
                probe=probe,
            )


def forms_ranks(check: str) -> bool:
    """Whether a check has live models; a round trip only names a layout for how files are cut."""
    return "layout" in CHECKS[check].axes and check != "round_trip"
