"""Layouts by name: `tp2-pp2-vp2` is spelled out, anything else is in `suites/layouts.toml`."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, Final

from bridge.errors import BridgeError, LayoutError
from bridge.pipeline import parse_layout, plan_layout, refuse_broken_layout
from bridge.spec import ModelSpec, ParallelLayout
from harness.errors import SuiteError
from harness.locations import suites_dir
from harness.toml_files import read_toml

_SPELLED: Final = re.compile(r"(tp\d+|pp\d+|vp\d+|sp)(-(tp\d+|pp\d+|vp\d+|sp|l[\d.]+))*")
_FIELDS: Final = frozenset(
    {
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "num_layers_in_first_pipeline_stage",
        "sequence_parallel",
        "make_vocab_size_divisible_by",
    }
)
_FIRST: Final = "num_layers_in_first_pipeline_stage"


@cache
def named_layouts() -> dict[str, dict[str, Any]]:
    """The definitions in `suites/layouts.toml`, by name.

    Raises:
        SuiteError: HN101, no TOML, another schema, or fields that no layout has.
    """
    return read_layouts(suites_dir() / "layouts.toml")


def read_layouts(path: Path) -> dict[str, dict[str, Any]]:
    """Read a file of layout definitions; raises as `named_layouts`."""
    try:
        document = read_toml(path)
    except (OSError, ValueError) as error:
        raise SuiteError(f"cannot read the layouts: {error}", where=str(path)) from None
    if document.pop("schema_version", None) != 1:
        raise SuiteError("schema_version must be 1", where=str(path))
    wrong = []
    for name, fields in document.items():
        if not isinstance(fields, dict):
            wrong.append(f"{name} is not a table")
            continue
        if _SPELLED.fullmatch(name):
            wrong.append(f"{name} already means what it spells")
        wrong += [f"{name}: unknown field {field}" for field in sorted(fields.keys() - _FIELDS)]
        wrong += [
            f"{name}: {field}={value!r} is no {'flag' if field == 'sequence_parallel' else 'count'}"
            for field, value in fields.items()
            if field in _FIELDS and type(value) is not (bool if field.startswith("seq") else int)
        ]
        if _FIRST in fields and fields.get("pipeline_model_parallel_size") != 2:
            wrong.append(f"{name}: {_FIRST} says all only with pipeline_model_parallel_size = 2")
        if _FIRST in fields and "virtual_pipeline_model_parallel_size" in fields:
            wrong.append(f"{name}: {_FIRST} does not go with virtual stages")
    if wrong:
        raise SuiteError(
            "layouts that cannot be used", where=[f"{path.name}: {one}" for one in wrong]
        )
    return document


def check_layout_name(name: str) -> None:
    """Refuse a name that no layout has, before any model is at hand.

    Raises:
        SuiteError: HN101, neither spelled out nor defined.
    """
    if not _SPELLED.fullmatch(name) and name not in named_layouts():
        raise SuiteError(
            f"no layout is called {name!r}",
            hint="spell it as tp2-pp1 or tp2-pp2-vp2, or use one of "
            + ", ".join(sorted(named_layouts())),
        )


def resolve_layout(name: str, spec: ModelSpec) -> ParallelLayout:
    """The layout of this name for this model.

    Raises:
        SuiteError: HN101, no such layout.
        LayoutError: BR200, BR201 or BR202, the model cannot be cut so.
    """
    check_layout_name(name)
    if name not in named_layouts():
        return parse_layout(name, spec)
    fields = dict(named_layouts()[name])
    first = fields.pop(_FIRST, None)
    stages = None if first is None else (first, spec.num_layers - first)
    return plan_layout(spec, num_layers_per_stage=stages, **fields)


def fits(name: str, spec: ModelSpec) -> bool:
    """Whether a model can be cut so."""
    try:
        resolve_layout(name, spec)
    except LayoutError:
        return False
    return True


def runs(spec: ModelSpec, name: str) -> bool:
    """Whether Megatron-Core can build and run this model in this layout."""
    try:
        refuse_broken_layout(spec, resolve_layout(name, spec))
    except BridgeError:
        return False
    return True
