"""What became of the faults: a unit is one on one model in one dtype, the matrix all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.faults import CATALOGUE


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One fault on one toy in one dtype, and what became of its cases."""

    fault: str
    toy: str
    killed_by: tuple[str, ...]
    """Checks that failed or refused."""
    first: str
    """What the first of them said."""
    checks: tuple[str, ...]
    """Checks that looked."""
    seconds: float
    seconds_by_check: Mapping[str, float] = field(default_factory=dict)
    dtype: str = "float32"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, a row of the kill matrix."""
        return {
            "fault": self.fault,
            "toy": self.toy,
            "dtype": self.dtype,
            "killed_by": list(self.killed_by),
            "looked": list(self.checks),
            "first": self.first,
            "seconds": round(self.seconds, 3),
            "seconds_by_check": {
                check: round(seconds, 3) for check, seconds in self.seconds_by_check.items()
            },
        }


def unit_from_data(data: Mapping[str, Any]) -> Unit:
    """The inverse of `Unit.to_dict`.

    Raises:
        KeyError: A field is missing.
        TypeError: One is something else than it should be.
    """
    texts = ("fault", "toy", "dtype", "first")
    lists = ("killed_by", "looked")
    seconds = {"": data["seconds"], **data["seconds_by_check"]}
    wrong = [name for name in texts if not isinstance(data[name], str)]
    wrong += [
        name
        for name in lists
        if not isinstance(data[name], list) or not all(isinstance(one, str) for one in data[name])
    ]
    wrong += ["seconds" for one in seconds.values() if type(one) not in {int, float}]
    if wrong:
        raise TypeError(f"a unit whose {', '.join(wrong)} cannot be")
    return Unit(
        fault=data["fault"],
        toy=data["toy"],
        dtype=data["dtype"],
        killed_by=tuple(data["killed_by"]),
        checks=tuple(data["looked"]),
        first=data["first"],
        seconds=data["seconds"],
        seconds_by_check=dict(data["seconds_by_check"]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """All units of a run."""

    units: Sequence[Unit]
    checks: Sequence[str]
    seconds: float
    faults: Sequence[str] = field(default_factory=tuple)

    @property
    def dtypes(self) -> list[str]:
        """What faults were tried in."""
        return list(dict.fromkeys(unit.dtype for unit in self.units))

    @property
    def killed_by(self) -> dict[str, list[str]]:
        """Per fault the checks that killed it on some toy, in the order of the registry."""
        return self.killed_in(None)

    def killed_in(self, dtype: str | None) -> dict[str, list[str]]:
        """The same in one dtype; None for any of them."""
        found: dict[str, set[str]] = {name: set() for name in self.faults}
        for unit in self.units:
            if dtype in (None, unit.dtype):
                found[unit.fault].update(unit.killed_by)
        return {
            name: [check for check in self.checks if check in killers]
            for name, killers in found.items()
        }

    @property
    def survivors(self) -> list[str]:
        """Faults that some toy let through in every dtype, and those that no toy was there for."""
        killers = self._killers
        alive = {fault for (fault, _), found in killers.items() if not found}
        tried = {fault for fault, _ in killers}
        return [name for name in self.faults if name in alive or name not in tried]

    @property
    def idle_checks(self) -> list[str]:
        """Checks that killed nothing."""
        busy = {check for killers in self.killed_by.values() for check in killers}
        return [check for check in self.checks if check not in busy]

    @property
    def indispensable(self) -> dict[str, list[str]]:
        """Per check the faults that, in some dtype and on some toy, nothing else kills.

        A suite may have one dtype only, and there is no other to fall back on.
        """
        found: dict[str, list[str]] = {check: [] for check in self.checks}
        for unit in self.units:
            if len(unit.killed_by) == 1:
                (check,) = unit.killed_by
                if unit.fault not in found[check]:
                    found[check].append(unit.fault)
        return found

    @property
    def _killers(self) -> dict[tuple[str, str], set[str]]:
        """What killed a fault on a toy, in whichever dtype."""
        found: dict[tuple[str, str], set[str]] = {}
        for unit in self.units:
            found.setdefault((unit.fault, unit.toy), set()).update(unit.killed_by)
        return found

    @property
    def redundant_checks(self) -> list[str]:
        """Checks that could be left away in every dtype."""
        return [check for check, faults in self.indispensable.items() if not faults]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `nemotron-bridge faults --json` prints it."""
        return {
            "faults": list(self.faults),
            "checks": list(self.checks),
            "killed_by": self.killed_by,
            "killed_by_dtype": {dtype: self.killed_in(dtype) for dtype in self.dtypes},
            "survivors": self.survivors,
            "idle_checks": self.idle_checks,
            "redundant_checks": self.redundant_checks,
            "only_killed_by": self.indispensable,
            "toys": sorted({unit.toy for unit in self.units}),
            "families": {name: CATALOGUE[name].family for name in self.faults},
            "stands_for": {name: CATALOGUE[name].stands_for for name in self.faults},
            "seconds_by_check": {
                check: round(sum(unit.seconds_by_check.get(check, 0.0) for unit in self.units), 1)
                for check in self.checks
            },
            "units": [unit.to_dict() for unit in self.units],
            "seconds": round(self.seconds, 1),
        }
