"""Mutations inside `torch.save`'s and NumPy's zip archives, with their sums made right again."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from random import Random
from typing import Final

from harness.fuzz.bytewise import flip_bits, put_integer
from harness.fuzz.pickles import change_in_place, change_pickle, payload

Mutator = Callable[[Random, bytes], bytes]

_LOCAL: Final = b"PK\3\4"
_CENTRAL: Final = b"PK\1\2"
_END: Final = b"PK\5\6"
_LOCAL_SIZE, _CENTRAL_SIZE = 30, 46
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)  # no clock in the bytes


def _entries(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Of each local header its place, its data's place and size, and the entry's name."""
    place = data.find(_LOCAL)
    while place >= 0 and place + _LOCAL_SIZE <= len(data):
        size, _, names, extras = struct.unpack_from("<2I2H", data, place + 18)
        name = data[place + _LOCAL_SIZE :][:names]
        begin = place + _LOCAL_SIZE + names + extras
        if size == 0xFFFFFFFF:  # in the ZIP64 field, the first of the extra ones
            wide = data[place + _LOCAL_SIZE + names + 4 :][:8]
            size = int.from_bytes(wide, "little")
        if begin + size > len(data):
            return
        yield place, begin, size, name
        place = data.find(_LOCAL, begin + size)


def with_right_sums(data: bytes) -> bytes:
    """The archives in a file, one or many, each entry's CRC-32 made that of its data.

    The k-th header of the data goes with the k-th of the directories, as in all that is written
    here and by torch.
    """
    found, central = bytearray(data), 0
    for place, begin, size, _ in _entries(data):
        total = zlib.crc32(data[begin : begin + size]).to_bytes(4, "little")
        found[place + 14 : place + 18] = total
        central = data.find(_CENTRAL, central)
        if central >= 0:
            found[central + 16 : central + 20] = total
            central += _CENTRAL_SIZE
        else:
            central = len(data)
    return bytes(found)


def in_place(rng: Random, data: bytes) -> bytes:
    """One of the pickles in a file changed without a change of its size; the sums are right."""
    pickles = [one for one in _entries(data) if one[3].endswith(b"data.pkl")]
    if not pickles:
        return flip_bits(rng, data)
    _, begin, size, _ = rng.choice(pickles)
    changed = change_in_place(rng, data[begin : begin + size])
    if len(changed) != size:
        return flip_bits(rng, data)
    return with_right_sums(data[:begin] + changed + data[begin + size :])


def directory_field(rng: Random, data: bytes) -> bytes:
    """A number near one of the archive's headers: sizes, offsets, counts, methods."""
    marks = [data.rfind(_END), data.rfind(b"PK\6\6"), data.rfind(_CENTRAL), data.find(_LOCAL)]
    place = rng.choice(marks)
    if place < 0:
        return flip_bits(rng, data)
    inside = put_integer(rng, data[place + 4 : place + _CENTRAL_SIZE])
    return data[: place + 4] + inside + data[place + _CENTRAL_SIZE :]


def around(inner: Mutator, *, suffix: str = "") -> Mutator:
    """A mutator of archives: one entry's bytes changed by `inner`, all else made anew around it.

    Args:
        inner: Of the entry's bytes.
        suffix: How the entry's name ends.
    """

    def change(rng: Random, data: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
            chosen = rng.choice([name for name in source.namelist() if name.endswith(suffix)])
            for info in source.infolist():
                inside = source.read(info)
                new = inner(rng, inside) if info.filename == chosen else inside
                target.writestr(zipfile.ZipInfo(info.filename, _EPOCH), new)
        return out.getvalue()

    return change


def other_entries(rng: Random, data: bytes) -> bytes:
    """An archive with an entry more, or less, or of another name."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        infos = source.infolist()
        odd, what = rng.randrange(len(infos)), rng.randrange(3)
        for index, info in enumerate(infos):
            name = info.filename
            if index == odd and what == 0:
                continue
            if index == odd and what == 1:
                name = rng.choice(("", "../x", "/x", "a" * 3000, f"{name}/", "data.pkl"))
            target.writestr(zipfile.ZipInfo(name, _EPOCH), source.read(info))
            if index == odd and what == 2:
                target.writestr(zipfile.ZipInfo(f"x/{name}", _EPOCH), b"")
    return out.getvalue()


change_pickled = around(change_pickle, suffix="data.pkl")
payload_pickled = around(payload, suffix="data.pkl")
