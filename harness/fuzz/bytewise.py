"""Mutations that need not know what they mutate."""

from __future__ import annotations

import re
from random import Random
from typing import Final

_INTEGERS: Final = (
    0, 1, -1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 1 << 30, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
    1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip
_TOKEN: Final = re.compile(rb'"(?:[^"\\\n]|\\.)*"|[\w.+-]+|\s+|.', re.DOTALL)
_MOST_SPLICED: Final = 4096  # bytes
_MOST_TEXT: Final = 1 << 15  # bytes of a file whose words are looked at

TOKENS: Final = (
    b"null", b"true", b"false", b"0", b"-1", b"1e999", b"-1e999", b"NaN", b"nan", b"Infinity",
    b"inf", b"1e-400", b"9" * 5000, b"1" + b"0" * 400, b"0.5", b"18446744073709551616",
    b"9223372036854775807", b"4294967296", b"2147483648", b"100000000", b'""', b'"\\ud800"',
    b'"\\u0000"', b'"../../../etc/passwd"', b'"/etc/passwd"', b'"/dev/zero"', b'"a\\u001b[31m"',
    b'"<script>alert(1)</script>"', b'"' + b"a" * 70_000 + b'"', b"[]", b"{}", b"[[[[]]]]",
    b"[" * 3000, b'{"a":' * 3000, b"[" * 20_000 + b"]" * 20_000, b",", b":", b"\xff\xfe",
    b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\0", b"\x1b]0;x\x07", b"\r\n", b"1979-05-27T07:32:00Z",
    b"0x10", b"1_000", b"'''", b'"""', b"[[", b"]]", b"=", b"#", b"&a", b"*a", b"<<: *a", b"!!",
    b"%s%n", b"__class__", b"$(touch nemotron-fuzz-canary)",
)  # fmt: skip
"""Words that parsers, and what comes after them, have stumbled over."""


def flip_bits(rng: Random, data: bytes) -> bytes:
    """A few bits anywhere."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))) if found else ():
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def put_bytes(rng: Random, data: bytes) -> bytes:
    """A few bytes replaced."""
    found, count = bytearray(data), rng.choice((1, 2, 4, 16))
    place = rng.randrange(len(found) + 1)
    found[place : place + count] = rng.randbytes(count)
    return bytes(found)


def put_integer(rng: Random, data: bytes) -> bytes:
    """An integer where a length, an offset or a count may stand: any width, either order."""
    width = rng.choice((1, 2, 4, 4, 8, 8))
    value = rng.choice(_INTEGERS) if rng.random() < 0.7 else len(data) + rng.randint(-9, 9)
    # Lengths stand at the beginning or the end of most formats.
    end = max(1, len(data) - width)
    place = rng.choice((rng.randrange(end), rng.randrange(min(end, 64)), end - 1 - _near(rng, end)))
    order = rng.choice(("little", "little", "big"))
    new = (value % (1 << 8 * width)).to_bytes(width, order)  # type: ignore[arg-type]  # a literal
    return data[:place] + new + data[place + width :]


def _near(rng: Random, end: int) -> int:
    return rng.randrange(min(end, 128))


def truncate(rng: Random, data: bytes) -> bytes:
    """The beginning, or the end, of it."""
    place = rng.randrange(len(data) + 1)
    return data[:place] if rng.random() < 0.7 else data[place:]


def repeat(rng: Random, data: bytes) -> bytes:
    """A part of it twice, or many times."""
    start, stop = _range(rng, data)
    return data[:stop] + data[start:stop] * rng.choice((1, 1, 2, 30)) + data[stop:]


def remove(rng: Random, data: bytes) -> bytes:
    """A part of it left out."""
    start, stop = _range(rng, data)
    return data[:start] + data[stop:]


def splice(rng: Random, data: bytes) -> bytes:
    """A part of it over another part."""
    start, stop = _range(rng, data)
    place = rng.randrange(len(data) + 1)
    keeps_size = rng.random() < 0.5
    return data[:place] + data[start:stop] + data[place + (stop - start) * keeps_size :]


def _range(rng: Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 4, 16, 64, 256, _MOST_SPLICED)))


def swap_tokens(rng: Random, data: bytes) -> bytes:
    """Words of a text: one replaced, left out, doubled, or two exchanged."""
    if not data or len(data) > _MOST_TEXT:
        return flip_bits(rng, data)
    found = _TOKEN.findall(data)
    one, other = rng.randrange(len(found)), rng.randrange(len(found))
    match rng.randrange(5):
        case 0 | 1:
            found[one] = rng.choice(TOKENS)
        case 2:
            found[one] = b""
        case 3:
            found[one] *= 2
        case _:
            found[one], found[other] = found[other], found[one]
    return b"".join(found)


def swap_lines(rng: Random, data: bytes) -> bytes:
    """Lines of a text: one left out, doubled, or two exchanged."""
    found = data.split(b"\n")
    one, other = rng.randrange(len(found)), rng.randrange(len(found))
    match rng.randrange(3):
        case 0:
            del found[one]
        case 1:
            found.insert(other, found[one])
        case _:
            found[one], found[other] = found[other], found[one]
    return b"\n".join(found)
