"""Writing pickles by name: deterministic, and without importing what they name.

`pickle.dumps` needs the classes at hand and memoizes by identity, so equal values can give unequal
bytes. Here a class is a pair of strings and equal values give equal bytes. Protocol 2, which is
what `torch.save` writes and `torch.load(weights_only=True)` reads.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from bridge.dtypes import Dtype
from bridge.errors import PlanError


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function, by module and name."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """The result of calling a global when the pickle is loaded."""

    function: Global
    args: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class New:
    """An instance made without arguments, then given its state: a dict, or for `__setstate__`."""

    cls: Global
    state: object


@dataclass(frozen=True, slots=True)
class Items:
    """A dict by its items, for keys that are not hashable before the pickle is loaded."""

    items: tuple[tuple[object, object], ...]


@dataclass(frozen=True, slots=True)
class PersistentId:
    """Something kept outside the pickle: for torch, a storage."""

    pid: tuple[object, ...]


_PROTOCOL: Final = b"\x80\x02"
_TUPLES: Final = {0: b")", 1: b"\x85", 2: b"\x86", 3: b"\x87"}


class _Writer:
    def __init__(self) -> None:
        self.out = bytearray(_PROTOCOL)
        self._memo: dict[str | Global, int] = {}

    def _recall(self, value: str | Global) -> bool:
        """Refer to an equal string or global that was written before."""
        index = self._memo.get(value)
        if index is None:
            return False
        self.out += struct.pack("<cB" if index < 256 else "<cI", b"hj"[index >= 256 :][:1], index)
        return True

    def _remember(self, value: str | Global) -> None:
        index = self._memo[value] = len(self._memo)
        self.out += struct.pack("<cB" if index < 256 else "<cI", b"qr"[index >= 256 :][:1], index)

    def write(self, value: object) -> None:  # noqa: C901, PLR0912 - one case per kind of value
        match value:
            case None:
                self.out += b"N"
            case bool():
                self.out += b"\x88" if value else b"\x89"
            case int():
                self._int(value)
            case float():
                self.out += b"G" + struct.pack(">d", value)
            case str():
                if not self._recall(value):
                    text = value.encode()
                    self.out += b"X" + struct.pack("<I", len(text)) + text
                    self._remember(value)
            case list():
                self.out += b"]("
                for item in value:
                    self.write(item)
                self.out += b"e"
            case tuple():
                self._tuple(value)
            case Mapping():
                self._dict(value.items())
            case Items():
                self._dict(value.items)
            case Global():
                if not self._recall(value):
                    self.out += b"c" + f"{value.module}\n{value.name}\n".encode("ascii")
                    self._remember(value)
            case Call():
                self.write(value.function)
                self._tuple(value.args)
                self.out += b"R"
            case New():
                self.write(value.cls)
                self.out += b")\x81"
                self.write(value.state)
                self.out += b"b"
            case PersistentId():
                self._tuple(value.pid)
                self.out += b"Q"
            case Dtype():
                self.write(Global("torch", value.name))
            case argparse.Namespace():
                self.write(New(Global("argparse", "Namespace"), vars(value)))
            case _:
                raise PlanError(f"no plain data, cannot be stored: {value!r}")

    def _int(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self.out += b"K" + struct.pack("<B", value)
        elif 0 <= value < 1 << 16:
            self.out += b"M" + struct.pack("<H", value)
        elif -(1 << 31) <= value < 1 << 31:
            self.out += b"J" + struct.pack("<i", value)
        else:
            size = value.bit_length() // 8 + 1
            self.out += b"\x8a" + struct.pack("<B", size)
            self.out += value.to_bytes(size, "little", signed=True)

    def _dict(self, items: Iterable[tuple[object, object]]) -> None:
        self.out += b"}("
        for key, item in items:
            self.write(key)
            self.write(item)
        self.out += b"u"

    def _tuple(self, values: tuple[object, ...]) -> None:
        if len(values) > 3:
            self.out += b"("
        for item in values:
            self.write(item)
        self.out += _TUPLES.get(len(values), b"t")


def dumps(value: object) -> bytes:
    """Pickle plain data: None, booleans, numbers, strings, lists, tuples, mappings, namespaces.

    Args:
        value: Of those, of `Dtype` (stored as torch's dtype) and of the classes above.

    Returns:
        The same bytes for equal values, dictionaries in equal order.

    Raises:
        PlanError: BR400, a value of any other type.
    """
    writer = _Writer()
    writer.write(value)
    writer.out += b"."
    return bytes(writer.out)
