"""YAML that would run something, or grow without end."""

from __future__ import annotations

from random import Random
from typing import Final

from harness.fuzz.pickles import CANARY

_COMMAND: Final = f"touch {CANARY}"
PAYLOADS: Final = (
    f'!!python/object/apply:os.system ["{_COMMAND}"]',
    f'!!python/object/new:os.system ["{_COMMAND}"]',
    f"!!python/object/apply:builtins.eval [\"open('{CANARY}', 'w')\"]",
    f'!!python/object/apply:subprocess.call [[touch, "{CANARY}"]]',
    f"!!python/object/new:tuple [!!python/object/new:map [!!python/name:eval, [{CANARY}]]]",
)
"""Values that run something where a loader is not a safe one."""


def payload(rng: Random, data: bytes) -> bytes:
    """A document with such a value in the place of one of its own."""
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    key, colon, _ = lines[place].partition(b": ")
    attack = rng.choice(PAYLOADS).encode()
    lines[place] = key + colon + attack if colon else b"hf_model_id: " + attack
    return b"\n".join(lines)


def bomb(rng: Random, data: bytes) -> bytes:
    """Aliases of aliases: some hundred bytes that are millions of values, or nest for ever."""
    width = rng.choice(((10, 9), (2, 60), (1, 1)))
    levels = [b"a0: &a0 [x, x]"]
    for level in range(1, width[1] + 1):
        inside = b", ".join([b"*a%d" % (level - 1)] * width[0])
        levels.append(b"a%d: &a%d [%s]" % (level, level, inside))
    last = b"*a%d" % width[1]
    loop = b"model: &m {hf_model_id: *m}"
    text = loop if width == (1, 1) else b"model: {hf_model_id: %s}" % last
    return b"\n".join([data * rng.randrange(2), *levels, text])
