"""Mutations of JSON that stays JSON, mostly, so that what reads its values is reached."""

from __future__ import annotations

import copy
import io
import json
import re
import struct
from random import Random
from typing import Any, Final

import numpy as np

from harness.fuzz.bytewise import TOKENS, flip_bits

_MANY: Final = 5000  # values of a document that is not to grow
_RAW: Final = re.compile(r'"@@raw(\d+)@@"')
_VALUES: Final = tuple(
    token.decode() for token in TOKENS if token[:1] in b'"0123456789-ntfNI[{' and len(token) < 1e5
)
_SCALARS: Final[tuple[Any, ...]] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 0.0, -0.0, 0.5, 1.0, 1e308, 5e-324, 1 << 31, 1 << 63,
    1 << 64, 10**30, 10**9, 100_001, "", "0", "x", "float8_e4m3fn", "../x", [], {}, [None], [[]],
    {"": None}, [0] * 3000, ["x"] * 300, {"no_op": True}, "a" * 300,
)  # fmt: skip


class _Document:
    """A parsed document, and what stands in it that no JSON library would write."""

    def __init__(self, rng: Random, value: Any) -> None:  # noqa: ANN401 - JSON
        self.rng, self.value = rng, value
        self.raw: list[str] = []

    def nodes(self) -> list[tuple[Any, Any]]:
        """Every (container, key) of it."""
        found: list[tuple[Any, Any]] = []
        level = [self.value]
        while level:
            inside = [
                (one, key)
                for one in level
                if isinstance(one, dict | list)
                for key in (one if isinstance(one, dict) else range(len(one)))
            ]
            found += inside
            level = [one[key] for one, key in inside]
        return found

    def put_raw(self, text: str) -> str:
        """Something that stands for this text."""
        self.raw.append(text)
        return f"@@raw{len(self.raw) - 1}@@"

    def nasty(self) -> Any:  # noqa: ANN401 - JSON
        """Some value that nobody expects."""
        if self.rng.random() < 0.5:
            return copy.deepcopy(self.rng.choice(_SCALARS))
        return self.put_raw(self.rng.choice(_VALUES))

    def change(self) -> None:
        """One change somewhere."""
        rng, nodes = self.rng, self.nodes()
        if not nodes or rng.random() < 0.01:
            self.value = self.nasty()
            return
        holder, key = rng.choice(nodes)
        match rng.randrange(10):
            case 0 | 1 | 2 | 3:
                holder[key] = self.nasty()
            case 4:
                del holder[key]
            case 5:
                other, place = rng.choice(nodes)
                one, two = copy.deepcopy(holder[key]), copy.deepcopy(other[place])
                holder[key] = two
                other[place] = one  # copies: one may be inside the other
            case 6 if isinstance(holder, dict):  # the key twice
                again = self.put_raw(f"1, {json.dumps(key)}: {json.dumps(holder[key])}")
                holder[key] = again
            case 6 | 7 if isinstance(holder, list):
                few = len(nodes) > _MANY
                holder[key:key] = [holder[key]] * (1 if few else rng.choice((1, 2, 50)))
            case 6 | 7:
                names = [name for _, name in nodes if isinstance(name, str)]
                name = rng.choice([*names, "", "__class__", "a" * 300, key.upper(), f"{key} "])
                holder[name] = holder.pop(key)
            case 8:
                holder[key] = _close_to(rng, holder[key])
            case _:
                holder[key] = [holder[key]] if rng.random() < 0.5 else {str(key): holder[key]}

    def text(self, *, indent: int | None) -> str:
        """As a file."""
        plain = json.dumps(self.value, indent=indent)
        return _RAW.sub(lambda match: self.raw[int(match[1])], plain)


def _close_to(rng: Random, value: Any) -> Any:  # noqa: ANN401 - JSON
    """A value of the same type, which is what range checks are for."""
    match value:
        case bool():
            return not value
        case int():
            return rng.choice((value + 1, value - 1, -value, value * 2, value << 40, float(value)))
        case float():
            return rng.choice((value * 2, -value, value * 1e300, int(value), str(value)))
        case str():
            return rng.choice((value[:-1], value * 2, value + "\0", value.upper(), f"../{value}"))
        case list():
            return rng.choice((value[::-1], value * 2, value[:1], []))
        case dict():
            return dict(list(value.items())[::-1][: rng.choice((1, None))])
        case _:
            return rng.choice((0, "", False))


def change_json(rng: Random, data: bytes) -> bytes:
    """One to three changes to the values of a JSON document."""
    try:
        document = _Document(rng, json.loads(data))
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            document.change()
        text = document.text(indent=rng.choice((None, 2)))
    except (ValueError, RecursionError, TypeError, IndexError, KeyError, OverflowError):
        return flip_bits(rng, data)  # an earlier mutation has left no JSON, or this one none
    return text.encode("utf-8", "surrogatepass")


def change_json_line(rng: Random, data: bytes) -> bytes:
    """The same in one line of several."""
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    lines[place] = change_json(rng, lines[place]).replace(b"\n", b"") if lines[place] else b""
    return b"\n".join(lines)


def change_safetensors(rng: Random, data: bytes) -> bytes:
    """The same in the header of a safetensors file, whose length then is right, mostly."""
    if len(data) < 8:
        return flip_bits(rng, data)
    (length,) = struct.unpack("<Q", data[:8])
    header = change_json(rng, data[8 : 8 + length])
    said = len(header) if rng.random() < 0.95 else rng.choice((0, 1, length, 100_000_000, 2**63))
    return struct.pack("<Q", said) + header + data[8 + length :]


def change_npy_json(rng: Random, data: bytes) -> bytes:
    """The same in a NumPy array of bytes that are JSON; its header says their new number."""
    start = data.find(b"\n") + 1
    if data[start : start + 1] != b"{":
        return flip_bits(rng, data)
    body = change_json(rng, data[start:])
    out = io.BytesIO()
    np.save(out, np.frombuffer(body, np.uint8))
    return out.getvalue()
