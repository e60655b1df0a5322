"""Mutations of pickles, opcode by opcode, and pickles that would run something."""

from __future__ import annotations

import pickle
import pickletools
import struct
from functools import lru_cache
from itertools import pairwise
from random import Random
from typing import Final

from harness.fuzz.bytewise import flip_bits, put_bytes

CANARY: Final = "nemotron-fuzz-canary"
"""The file that payloads would make in the directory where they run."""

_COMMAND: Final = f"touch {CANARY}"
_PAYLOADS: Final = (
    f"cos\nsystem\n(S'{_COMMAND}'\ntR.",  # GLOBAL, REDUCE
    f"cposix\nsystem\n(V{_COMMAND}\ntR.",
    f"(S'{_COMMAND}'\nios\nsystem\n.",  # INST
    f"(cos\nsystem\nS'{_COMMAND}'\no.",  # OBJ
    f'c__builtin__\neval\n(S\'open("{CANARY}","w")\'\ntR.',
    f'cbuiltins\nexec\n(S\'open("{CANARY}","w")\'\ntR.',
    f"cbuiltins\nopen\n(S'{CANARY}'\nS'w'\ntR.",
    f"c_io\nopen\n(S'{CANARY}'\nS'w'\ntR.",
    f"c_io\nFileIO\n(S'{CANARY}'\nS'w'\ntR.",
    f"cpathlib\nPath.touch\n(cpathlib\nPosixPath\n(S'{CANARY}'\ntRtR.",
    f"csubprocess\ncall\n((lS'touch'\naS'{CANARY}'\natR.",
    f"ccommands\ngetoutput\n(S'{_COMMAND}'\ntR.",
    f"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR(S'{_COMMAND}'\ntR.",
    f'cnumpy.testing._private.utils\nrunstring\n(S\'open("{CANARY}","w")\'\n(dtR.',
    f"ctorch.serialization\nos.system\n(S'{_COMMAND}'\ntR.",
    f"ctorch._utils\nsys.modules\np0\n0g0\n(S'{_COMMAND}'\ntR.",
    f"ctorch.hub\nload_state_dict_from_url\n(S'file:///{CANARY}'\ntR.",
)
_WITH_STACK_GLOBAL: Final = tuple(
    b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)])
    + name.encode() + b"\x93\x8c" + bytes([len(argument)]) + argument.encode() + b"\x85R."
    for module, name, argument in (
        ("os", "system", _COMMAND),
        ("builtins", "eval", f"open('{CANARY}','w')"),
        ("torch.serialization", "os.system", _COMMAND),
        ("numpy", "sys.modules", "os"),
    )
)  # fmt: skip
# A global, then a state for it, that would put a function where an attribute is looked up.
_BUILDS: Final = (
    f"cargparse\nNamespace\n)\x81}}S'__setstate__'\ncos\nsystem\nsbS'{_COMMAND}'\nb.",
    f"ctorch\nSize\n}}S'__reduce__'\ncos\nsystem\nsb(S'{_COMMAND}'\ntR.",
    f"ccollections\nOrderedDict\n)R}}S'__setitem__'\ncos\nsystem\nsbS'{_COMMAND}'\nK\x01s.",
)
PAYLOADS: Final[tuple[bytes, ...]] = (
    *(text.encode("latin1") for text in _PAYLOADS),
    *_WITH_STACK_GLOBAL,
    *(b"\x80\x02" + text.encode("latin1") for text in _BUILDS),
)
"""Pickles that run something on most `pickle.load`s: each makes `CANARY`, or would if it could."""

_VALUES: Final[tuple[bytes, ...]] = (
    *(
        pickle.dumps(value, 2)[2:-1]
        for value in (
            None, True, 0, -1, 1, 255, 1 << 31, 1 << 63, -(1 << 70), 10**30, 0.0, float("nan"),
            float("inf"), "", "x", "../x", "a\0b", "\ud800", "x" * 3000, (), [], {}, (1,), (0, 0),
            (1 << 62, 1 << 62), [0] * 300, {"a": 1}, b"", b"\xff" * 9,
        )
    ),
    b"]" * 3000 + b"a" * 2999,
    b"(" * 5000,
    b"K\x01" + b"\x85" * 100_000,
    b"\x8b\xff\xff\xff\x7f",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"r\xff\xff\xff\x7f",
    b"j\xff\xff\xff\x7f",
    b"\x82\x01",
    b"I" + b"9" * 5000 + b"\n",
    b"L" + b"9" * 5000 + b"L\n",
    b"Fnan\n",
)  # fmt: skip
_DEEP: Final = 40


def _doubling(start: bytes, step: bytes, end: bytes = b"") -> bytes:
    """Values of which each holds the one before twice: cheap to write, endless to print or hash."""
    grown = [step % (number - 1, number - 1, number) for number in range(1, _DEEP)]
    return start + b"".join(grown) + end


_BOMBS: Final = (
    _doubling(b"]p0\n", b"0]g%d\nag%d\nap%d\n"),
    _doubling(b"}p0\n", b"0}K\x00g%d\nsK\x01g%d\nsp%d\n"),
    _doubling(b")p0\n", b"0g%d\ng%d\n\x86p%d\n"),
    _doubling(b")p0\n", b"0g%d\ng%d\n\x86p%d\n", b"0}g39\nK\x01s"),
    _doubling(b"ctorch.x\nY\n)\x81p0\n", b"0ctorch.x\nY\n(g%d\ng%d\nt\x81p%d\n"),
    b"]p0\ng0\na",
    b"ctorch.x\nY\n)\x81p0\n}S'a'\ng0\nsb",
)
_GLOBALS: Final = tuple(
    b"c%s\n" % name
    for name in (
        b"torch\nSize", b"torch\nfloat32", b"torch\nfloat8_e4m3fn", b"torch\nnn.Module",
        b"collections\nOrderedDict", b"collections\ndefaultdict", b"argparse\nNamespace",
        b"builtins\nset", b"builtins\nfrozenset", b"builtins\ngetattr", b"_codecs\nencode",
        b"torch._utils\n_rebuild_tensor_v2", b"torch._utils\n_rebuild_parameter",
        b"torch._utils\n_rebuild_tensor_v3", b"torch\nFloatStorage", b"numpy\nndarray",
        b"torch.storage\nUntypedStorage", b"os\nsystem", b"builtins\neval", b"a" * 3000 + b"\nb",
        b"torch.distributed.checkpoint.metadata\nMetadata", b"pathlib\nPosixPath", b"\n",
    )
)  # fmt: skip
_LOOSE: Final = (b"N", b"(", b"t", b"R", b"b", b"a", b"s", b"u", b"e", b"0", b"1", b"2", b"Q",
                 b"\x81", b"\x85", b"\x86", b"\x87", b"]", b"}", b")", b".", b"\x94")  # fmt: skip


@lru_cache(maxsize=64)
def _opcodes(data: bytes) -> tuple[bytes, ...]:
    """A pickle cut into its opcodes; () for what is none."""
    try:
        places = [place for _, _, place in pickletools.genops(data) if place is not None]
    except Exception:  # noqa: BLE001 - whatever genops makes of bytes that are no pickle
        return ()
    return tuple(data[start:stop] for start, stop in pairwise([*places, len(data)]))


def change_pickle(rng: Random, data: bytes) -> bytes:
    """One to three opcodes replaced, left out, doubled or exchanged; strings by other strings."""
    found = list(_opcodes(data))
    if not found:
        return flip_bits(rng, data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place = rng.randrange(len(found))
        match rng.randrange(9):
            case 0 | 1 | 2:
                place = _value_near(found, place)
                found[place] = rng.choice(_VALUES if rng.random() < 0.85 else _BOMBS)
            case 3:
                found[place] = b""
            case 4:
                found[place] *= rng.choice((2, 2, 3, 1000))
            case 5:
                other = rng.randrange(len(found))
                found[place], found[other] = found[other], found[place]
            case 6:
                found[place] += rng.choice(_LOOSE)
            case 7:
                found[place] = rng.choice(_GLOBALS) if rng.random() < 0.5 else rng.choice(found)
            case _:
                found[place] = put_bytes(rng, found[place])
    return b"".join(found)


def _value_near(found: list[bytes], place: int) -> int:
    """The next opcode that is a number, a string or a constant."""
    for step in range(len(found)):
        index = (place + step) % len(found)
        if found[index][:1] in b"KMJIGXUTVSN\x88\x89\x8a\x8c":
            return index
    return place


def change_in_place(rng: Random, data: bytes) -> bytes:
    """An opcode's argument replaced by as many other bytes, so that nothing behind it moves."""
    found = list(_opcodes(data))
    places = [index for index, one in enumerate(found) if len(one) > 1]
    if not places:
        return flip_bits(rng, data)
    place = rng.choice(places)
    one = found[place]
    if one[:1] in b"KMJ":
        new = rng.choice((0, 1, 0xFFFFFFFF, 0x80000000, rng.getrandbits(32)))
        found[place] = one[:1] + struct.pack("<I", new)[: len(one) - 1]
    else:
        other = rng.choice([each for each in found if len(each) == len(one)])
        found[place] = other if rng.random() < 0.4 else one[:1] + put_bytes(rng, one[1:])
    return b"".join(found)[: len(data)]


def payload(rng: Random, data: bytes) -> bytes:
    """A pickle that would run something, alone or with the whole of another around it."""
    attack = rng.choice(PAYLOADS)
    found = list(_opcodes(data))
    if not found or rng.random() < 0.3:
        return attack
    # In place of a value: the rest of the pickle is then read as it was.
    _, *inner = _opcodes(b"\x80\x02" + attack.removeprefix(b"\x80\x02").removeprefix(b"\x80\x04"))
    place = _value_near(found, rng.randrange(len(found)))
    found[place] = b"".join(inner[:-1])
    return b"".join(found)
