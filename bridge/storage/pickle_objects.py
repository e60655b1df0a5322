"""What stands in for the objects of a pickle: our own data, of which a pickle can change nothing.

Each class takes no state, and each function looks at what it is given, because a hostile pickle
hands anything to anything. `bridge.storage.unpickle` gives these and no others.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as brief
from typing import ClassVar, Final, Never, Self

from bridge.dtypes import Dtype
from bridge.errors import CorruptFileError, DtypeMismatchError
from bridge.storage.pickle_scan import refuse_keys
from bridge.tiling import Shape


class Inert:
    """An object of a class, or the result of a function, that was named and not run.

    `module` and `qualname` say which; `args`, `state` and `items` are what the pickle gave it.
    """

    module: ClassVar[str] = ""
    qualname: ClassVar[str] = ""
    may_be_called: ClassVar[bool] = True

    args: tuple[object, ...]
    state: object
    items: list[object]

    def __new__(cls, *args: object, **_: object) -> Self:
        """Remember the arguments; accept any.

        Raises:
            CorruptFileError: BR302, the name is that of a function, and not on the list.
        """
        if not cls.may_be_called:
            raise CorruptFileError(
                f"its pickle calls {cls.module}.{cls.qualname}, which no checkpoint needs"
            )
        self = object.__new__(cls)
        self.args = args
        self.state = None
        self.items = []
        return self

    def __init__(self, *_: object, **__: object) -> None:
        """Nothing to do: `__new__` has kept everything."""

    def __setstate__(self, state: object) -> None:
        """Keep what would have become attributes."""
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        self.items.append((key, value))

    def append(self, value: object) -> None:
        """Keep an item of what would have been a list."""
        self.items.append(value)

    def extend(self, values: Iterable[object]) -> None:
        """Keep items of what would have been a list."""
        self.items.extend(values)

    def __repr__(self) -> str:
        return f"<{self.module}.{self.qualname}>"  # its arguments may hold one another

    def is_a(self, *qualnames: str) -> bool:
        """Whether the pickle named it so, whichever module it lives in."""
        return self.qualname in qualnames

    def field(self, name: str) -> object:
        """A field of a plain object; None when it has no such field."""
        return self.state.get(name) if isinstance(self.state, dict) else None


def _no_state(_: object, state: object) -> Never:
    """Be `__setstate__` of what is checked when built, so that no pickle changes it afterwards."""
    raise ValueError(f"a state for a tensor: {brief(state)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor as its pickle describes it: where its elements lie in which storage."""

    dtype: Dtype
    shape: Shape
    stride: Shape
    """In elements."""
    storage: str
    """The storage's key: its file in the archive is `data/KEY`."""
    storage_offset: int
    """In elements."""
    storage_nbytes: int

    __setstate__ = _no_state


@dataclass(frozen=True, slots=True)
class Storage:
    """What a persistent id names. `dtype` is None for untyped storages, which count bytes."""

    dtype: Dtype | None
    key: str
    numel: int

    __setstate__ = _no_state


class Call:
    """A function of ours, of which a pickle gets nothing but what it returns."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *args: object) -> object:
        """What the function makes of what the pickle gives it."""
        return self._function(*args)

    __setstate__ = _no_state


def set_names(space: argparse.Namespace, state: object) -> None:
    """Be `__setstate__` of a namespace: what it holds, and nothing of its class."""
    if not isinstance(state, dict) or not all(type(name) is str for name in state):
        raise ValueError(f"a state for a namespace: {brief(state)}")
    vars(space).update(state)


def _integers(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(v) is int and v >= 0 for v in values):
        raise ValueError(f"not sizes: {brief(values)}")
    return values


def _size(values: Sequence[int] = ()) -> tuple[int, ...]:
    return _integers(tuple(values))


def _tensor(
    storage: Storage, offset: int, size: Shape, stride: Shape, *rest: object
) -> StoredTensor:
    """Stand in for `torch._utils._rebuild_tensor_v2`, and `_v3`, which also names the dtype."""
    dtype = storage.dtype or (rest[2] if len(rest) > 2 else None)
    if not isinstance(dtype, Dtype):
        named = brief(getattr(dtype, "qualname", dtype))
        raise DtypeMismatchError(f"a tensor of unknown dtype {named}")
    shape, strides = _integers(size), _integers(stride)
    if type(offset) is not int or offset < 0 or len(shape) != len(strides):
        raise ValueError(f"not a tensor: offset {brief(offset)}, size {shape}, stride {strides}")
    return StoredTensor(
        dtype=dtype,
        shape=shape,
        stride=strides,
        storage=storage.key,
        storage_offset=offset,
        storage_nbytes=storage.numel * (storage.dtype.itemsize if storage.dtype else 1),
    )


def _parameter(data: StoredTensor, *_: object) -> StoredTensor:
    return data


def _encode(text: str, encoding: str = "utf-8", *_: object) -> bytes:
    # How protocol 2 writes bytes. `str.encode` would import a codec of any name: latin-1 it is.
    if type(text) is not str or encoding != "latin1":
        raise ValueError(f"not bytes: {brief(encoding)}")
    return text.encode("latin1")


def _plain_dict(*args: object) -> dict[object, object]:
    return dict(args[-1]) if args and isinstance(args[-1], dict) else {}


def _ordered(pairs: Sequence[Sequence[object]] = ()) -> OrderedDict[object, object]:
    refuse_keys([key for key, _ in pairs])
    return OrderedDict((key, value) for key, value in pairs)


def _set(values: Sequence[object] = ()) -> set[object]:
    refuse_keys(values)
    return set(values)


def _frozenset(values: Sequence[object] = ()) -> frozenset[object]:
    return frozenset(_set(values))


METADATA: Final[Mapping[tuple[str, str], object]] = {("torch", "Size"): _size}
"""What `.metadata` gets: package and name to what stands in. All else in it is `Inert`."""
TENSORS: Final[Mapping[tuple[str, str], object]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    **METADATA,
    ("collections", "OrderedDict"): _ordered,
}
OBJECTS: Final[Mapping[tuple[str, str], object]] = {
    **TENSORS,
    ("argparse", "Namespace"): argparse.Namespace,
    ("collections", "defaultdict"): _plain_dict,
    ("collections", "Counter"): _plain_dict,
    ("builtins", "set"): _set,
    ("builtins", "frozenset"): _frozenset,
    ("_codecs", "encode"): _encode,
}
