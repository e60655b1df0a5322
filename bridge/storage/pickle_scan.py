"""A walk over a pickle's opcodes, before anything is built from them.

What a pickle builds can be far bigger than the pickle. One flipped bit makes the memo 30 GiB. Forty
tuples of two, each the one before twice, are 10^12 numbers to whoever hashes or prints the last;
a hundred thousand tuples of one, each in the next, overflow the stack in the hash of the outermost
and kill the process. So the walk keeps a stack of sizes, and refuses what grows beyond all use.
"""

from __future__ import annotations

import pickletools
from argparse import Namespace
from collections.abc import Sequence
from typing import Final

_MAX_SIZE: Final = 1 << 24
"""Of a tuple: of its elements' sizes the sum, doubled; so no more than 23 are nested."""
_MAX_DEPTH: Final = 100
"""Of what holds what; Python prints some hundreds, and real ones have about ten."""
_MAX_OPCODES: Final = 1 << 25
"""Each of which makes at most one object, of some 100 bytes; sets are counted by themselves."""
_MAX_REPEATED: Final = 1 << 28
"""Sizes of all tuples that are used again, added up: what hashing them all can cost."""
_MAX_TUPLE_KEYS: Final = 1 << 12
"""Text hashes with a secret, tuples of numbers do not: the hashes of all can be chosen to be one,
and then a dict takes the square of their number. Checkpoints have none as keys."""


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


def _stack_effects() -> dict[int, tuple[int, bool, int]]:
    """Opcode to how many it pops above the mark or at all, whether up to a mark, what it pushes."""
    effects = {}
    for opcode in pickletools.opcodes:
        to_mark = pickletools.markobject in opcode.stack_before
        popped = len(opcode.stack_before)
        if to_mark:  # what stands before the mark, such as the list that is appended to
            popped = opcode.stack_before.index(pickletools.markobject)
        effects[ord(opcode.code)] = popped, to_mark, len(opcode.stack_after)
    return effects


_MARK, _POP, _DUP, _STOP, _MEMOIZE = (ord(code) for code in "(02.\x94")
_PUTS: Final = frozenset(map(ord, "pqr"))
_GETS: Final = frozenset(map(ord, "ghj"))
_TUPLES: Final = frozenset(map(ord, "t\x85\x86\x87"))
_REFUSED: Final = frozenset(map(ord, "\x82\x83\x84"))  # extension codes
_LONG1, _LONG4, _INT, _LONG = (ord(code) for code in "\x8a\x8bIL")
_INTEGERS: Final = frozenset({_LONG1, _LONG4, _INT, _LONG})
"""Of any length. Python hashes integers modulo 2**61 - 1, so that longer ones can all collide, and
a dict of such keys takes the square of their number; none of over 4300 digits can be printed."""
_MIN, _MAX, _DIGITS = -(1 << 63), (1 << 64) - 1, 20
_KEYS: Final = {
    ord("s"): slice(1, 2),
    ord("u"): slice(0, None, 2),
    ord("d"): slice(0, None, 2),
    0x90: slice(None),
    0x91: slice(None),
}
"""Opcodes that put into dicts and sets, to where the keys are in what they take off the stack."""
_MADE: Final = {ord("R"): 2, 0x91: 2}
"""Opcodes that may make what is hashed by its contents, as torch's sizes and frozen sets are."""
_EMPTY_SET: Final = 0x8F
_COSTS: Final = {_EMPTY_SET: 1 << 8}
"""Opcodes that make something far bigger than themselves, which may be done a million times."""
_NO_KEYS: Final = slice(0)
_FIXED, _PREFIXED, _LINES = _argument_sizes()
_EFFECTS: Final = _stack_effects()
_PLAIN: Final = {
    code: width
    for code, width in _FIXED.items()
    if _EFFECTS[code] == (0, False, 1) and code not in {*_GETS, *_REFUSED, _MARK, _DUP, _EMPTY_SET}
}
"""Opcodes that push one plain value, to their argument's bytes: most of any pickle."""


def refuse_bombs(data: bytes) -> None:
    """Walk the opcodes and refuse what costs more than a pickle of this length should.

    `pickle.Unpickler` allocates and clears a memo up to the highest index it is given: one flipped
    bit can make that 30 GiB.

    Raises:
        ValueError: An index above the number of bytes, tuples in tuples beyond all use, an integer
            of more than 64 bits, thousands of tuples as keys, an opcode that is unknown or means
            what this process has registered, or no end.
        LookupError: It takes what it has not put there.
    """
    position, size = 0, len(data)
    sizes: list[int] = []  # of what is on the stack: 1 of whatever no hash looks into
    marks: list[int] = []
    memo: dict[int, int] = {}
    repeated = tuple_keys = 0
    push = sizes.append
    for _ in range(_MAX_OPCODES):
        if position >= size:
            raise ValueError("it does not end")
        code = data[position]
        position += 1
        if code in _PLAIN:
            position += _PLAIN[code]
            push(1)
            continue
        if code == _MEMOIZE:
            memo[len(memo)] = sizes[-1]
            continue
        if code == _MARK:
            marks.append(len(sizes))
            continue
        if code == _STOP:
            return
        start = position
        position = _after_argument(data, code, position)
        if code in _PUTS or code in _GETS:
            argument = data[start:position]
            index = int(argument) if code in _LINES else int.from_bytes(argument, "little")
            if index > size:
                raise ValueError("a memo index beyond its size")
            if code in _PUTS:
                memo[index] = sizes[-1]
                continue
            push(memo[index])
            repeated += memo[index]
        elif code == _DUP:
            push(sizes[-1])
            repeated += sizes[-1]
        elif code == _POP and marks and marks[-1] == len(sizes):
            marks.pop()
        else:
            popped, to_mark, pushed = _EFFECTS[code]
            first = marks.pop() if to_mark else len(sizes) - popped
            made = 1 + 2 * sum(sizes[first:]) if code in _TUPLES else _MADE.get(code, 1)
            repeated += _COSTS.get(code, 0)
            if made > _MAX_SIZE or first < 0:
                raise ValueError("it nests tuples beyond all use, or takes what is not there")
            tuple_keys += sum(key > 1 for key in sizes[first:][_KEYS.get(code, _NO_KEYS)])
            del sizes[first - popped if to_mark else first :]
            if pushed:
                push(made)
        if repeated > _MAX_REPEATED or tuple_keys > _MAX_TUPLE_KEYS:
            raise ValueError("it repeats itself, or has tuples as keys, beyond all use")
    raise ValueError(f"it has more than {_MAX_OPCODES} opcodes")


def _after_argument(data: bytes, code: int, position: int) -> int:
    if code in _REFUSED:
        raise ValueError("an extension code: its meaning is not in the file")
    if code in _FIXED:
        return position + _FIXED[code]
    if code in _PREFIXED:
        start = position + _PREFIXED[code]
        end = start + int.from_bytes(data[position:start], "little")
        if (
            code in _INTEGERS
            and not _MIN <= int.from_bytes(data[start:end], "little", signed=True) <= _MAX
        ):
            raise ValueError("an integer of more than 64 bits")
        return end
    if code not in _LINES:
        raise ValueError(f"unknown opcode {code:#x}")
    start = position
    for _ in range(_LINES[code]):
        position = data.find(b"\n", position) + 1 or len(data)
    line = data[start:position].rstrip(b"L\n")
    if code in _INTEGERS and (len(line) > _DIGITS or not _MIN <= int(line) <= _MAX):
        raise ValueError("an integer of more than 64 bits")
    return position


def refuse_keys(keys: Sequence[object]) -> None:
    """Refuse what a set or a dict is to be made of at once, as the walk refuses keys one by one.

    Raises:
        ValueError: Thousands of them are tuples.
    """
    if sum(isinstance(key, tuple) for key in keys) > _MAX_TUPLE_KEYS:
        raise ValueError("it has tuples as keys beyond all use")


def refuse_repetition(value: object) -> None:
    """Refuse lists and mappings that hold one another so often that nobody could print them.

    Of tuples the walk has seen it. What lists hold is known when all of them are built.

    Raises:
        ValueError: Written out, it has more than 16 million values, nests more than 100 deep, or
            holds itself.
    """
    depths: dict[int, int] = {}
    sizes: dict[int, int] = {}
    waiting: list[object] = [value]
    while waiting:
        one = waiting[-1]
        children = _children(one)
        if id(one) in sizes:
            waiting.pop()
            if sizes[id(one)] == 0:
                size = 1 + sum(sizes.get(id(child), 1) or _MAX_SIZE for child in children)
                if size > _MAX_SIZE:
                    raise ValueError("it holds more than any checkpoint needs, or itself")
                sizes[id(one)] = size
                depths[id(one)] = depth = 1 + max(
                    (depths.get(id(c), 0) for c in children), default=0
                )
                if depth > _MAX_DEPTH:
                    raise ValueError(f"it nests more than {_MAX_DEPTH} deep")
            continue
        sizes[id(one)] = 0  # open: whoever meets it again meanwhile is inside it
        waiting += [child for child in children if _children(child) and id(child) not in sizes]


def _children(value: object) -> Sequence[object]:
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return [*value, *value.values()]
    return list(value) if isinstance(value, list | tuple | set | frozenset) else ()
