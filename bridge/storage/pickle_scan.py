"""A walk over a pickle's opcodes, before anything is built from them."""

from __future__ import annotations

import pickletools


def _argument_sizes() -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
    """Opcode to the bytes of its argument, to the bytes of its length, to its lines of text."""
    fixed: dict[int, int] = {}
    prefixed: dict[int, int] = {}
    lines: dict[int, int] = {}
    widths = {
        pickletools.TAKEN_FROM_ARGUMENT1: 1,
        pickletools.TAKEN_FROM_ARGUMENT4: 4,
        pickletools.TAKEN_FROM_ARGUMENT4U: 4,
        pickletools.TAKEN_FROM_ARGUMENT8U: 8,
    }
    for opcode in pickletools.opcodes:
        code, size = ord(opcode.code), opcode.arg.n if opcode.arg else 0
        if size >= 0:
            fixed[code] = size
        elif size == pickletools.UP_TO_NEWLINE:
            lines[code] = 2 if opcode.name in {"GLOBAL", "INST"} else 1
        else:
            prefixed[code] = widths[size]
    return fixed, prefixed, lines


_FIXED, _PREFIXED, _LINES = _argument_sizes()


def refuse_bombs(data: bytes) -> None:
    """Walk the opcodes and refuse lengths and memo indices that no real pickle has.

    `pickle.Unpickler` allocates and clears a memo up to the highest index it is given: one flipped
    bit can make that 30 GiB.

    Raises:
        ValueError: An index above the number of bytes, an unknown opcode, or no end.
    """
    position, size = 0, len(data)
    while position < size:
        code = data[position]
        position += 1
        if code == ord("."):
            return
        if code in _FIXED:
            width = _FIXED[code]
            if code == ord("r") and int.from_bytes(data[position : position + 4], "little") > size:
                raise ValueError("a memo index beyond its size")
            position += width
        elif code in _PREFIXED:
            width = _PREFIXED[code]
            position += width + int.from_bytes(data[position : position + width], "little")
        elif code in _LINES:
            start = position
            for _ in range(_LINES[code]):
                position = data.find(b"\n", position) + 1 or size
            if code == ord("p") and int(data[start:position]) > size:
                raise ValueError("a memo index beyond its size")
        else:
            raise ValueError(f"unknown opcode {code:#x}")
    raise ValueError("it does not end")
