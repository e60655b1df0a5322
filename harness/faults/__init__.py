"""The catalogue of faults: wrong bridges, damaged files, wrong witnesses, wrong launches.

Each is named, says which real bug it stands for, and goes in through a seam of `harness.hooks`. A
check that none of them kills is no check, and a fault that no check kills is a hole;
`harness.faults.matrix` shows which is which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from bridge.errors import BridgeError
from bridge.spec import ModelSpec
from harness.errors import SuiteError
from harness.faults import (
    arithmetic,
    caches,
    configuration,
    mapping,
    parallel,
    references,
    storage,
)
from harness.hooks import Fault

CATALOGUE: Final[Mapping[str, Fault]] = {
    fault.name: fault
    for module in (mapping, configuration, arithmetic, caches, parallel, storage, references)
    for fault in module.FAULTS
}


def fault_named(name: str) -> Fault:
    """Look a fault up.

    Raises:
        SuiteError: HN101, no such fault.
    """
    try:
        return CATALOGUE[name]
    except KeyError:
        raise SuiteError(
            f"no fault is called {name!r}", hint="`nemotron-bridge faults --list` shows them"
        ) from None


def applicable(fault: Fault, spec: ModelSpec) -> bool:
    """Whether a model has what the fault spoils; what is read as it stands is not spoilt."""
    if fault.applies is not None and not fault.applies(spec):
        return False
    try:
        return fault.spec is None or fault.spec(spec) != spec
    except BridgeError:
        return True  # another model, and one that makes no sense
