"""From a kind, a seed and an index to an input: the same bytes for the same three, anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from harness.fuzz import archives, bytewise, pickles, structured, yamls

Mutator = Callable[[Random, bytes], bytes]

_ANY: Final[tuple[Mutator, ...]] = (
    bytewise.flip_bits,
    bytewise.put_bytes,
    bytewise.put_integer,
    bytewise.truncate,
    bytewise.repeat,
    bytewise.remove,
    bytewise.splice,
)
_WORDS: Final[tuple[Mutator, ...]] = (bytewise.swap_tokens, bytewise.swap_lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a format's inputs are made by.

    Args:
        knowing: Mutators that know the format. They see whole files only.
        loose: Those that do not; several may follow one another.
        payloads: Those that put something to run into a file.
    """

    knowing: tuple[Mutator, ...]
    loose: tuple[Mutator, ...] = _ANY
    payloads: tuple[Mutator, ...] = ()


JSON: Final = Form(knowing=(structured.change_json,), loose=(*_ANY, *_WORDS))
JSON_LINES: Final = Form(knowing=(structured.change_json_line,), loose=(*_ANY, *_WORDS))
TEXT: Final = Form(knowing=_WORDS, loose=_ANY)
SAFETENSORS: Final = Form(knowing=(structured.change_safetensors,))
PICKLE: Final = Form(knowing=(pickles.change_pickle,), payloads=(pickles.payload,))
ARCHIVE: Final = Form(
    knowing=(
        archives.change_pickled,
        archives.change_pickled,
        archives.in_place,
        archives.directory_field,
        archives.other_entries,
    ),
    payloads=(archives.payload_pickled,),
)
RECORDS: Final = Form(knowing=(archives.in_place, archives.directory_field))
"""Archives one behind another, found by their places: nothing may move."""
ARRAYS: Final = Form(
    knowing=(
        archives.around(bytewise.put_integer),
        archives.around(structured.change_npy_json),
        archives.directory_field,
        archives.other_entries,
    )
)
YAML: Final = Form(knowing=(*_WORDS, yamls.bomb), payloads=(yamls.payload,))

_KNOWING, _PAYLOAD = 0.7, 0.04
"""Of the inputs: made by what knows the format; with something to run in them."""


@dataclass(frozen=True, slots=True)
class Input:
    """The bytes, and whether something to run is in them."""

    data: bytes
    has_payload: bool


def mutate(name: str, form: Form, originals: Sequence[bytes], *, seed: int, index: int) -> Input:
    """The input of this number.

    Args:
        name: Of the kind.
        form: Of its format.
        originals: Files to begin with.
        seed: Of the run.
        index: From 0.
    """
    rng = Random(f"{name}:{seed}:{index}")  # noqa: S311 - it is to be foreseen
    data = rng.choice(originals)
    if form.payloads and rng.random() < _PAYLOAD:
        return Input(rng.choice(form.payloads)(rng, data), has_payload=True)
    if rng.random() < _KNOWING:
        data = rng.choice(form.knowing)(rng, data)
        if rng.random() < 0.8:
            return Input(data, has_payload=False)
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = rng.choice(form.loose)(rng, data)
    return Input(data, has_payload=False)
