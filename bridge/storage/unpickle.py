"""Reading pickles without running them.

Megatron's `.metadata`, `common.pt` and tensor records are pickles, and a pickle is a program. The
unpicklers here import nothing. There are two lists, and both are of what is allowed:

- What becomes a real object: numbers, text and containers; `argparse.Namespace`, `OrderedDict`,
  sets; torch's sizes and dtypes; tensors as descriptions of where they lie. A closed table.
- What may stand there as a name. Its instances are `Inert`: they remember what they were called
  with, and nothing of that name is ever looked for. `.metadata` may name what torch.distributed and
  Megatron-Core write; a tensor's record, storages; arguments, any class of any package but those of
  Python's own library, of which few are on a list, because a run's arguments hold enums and
  configurations of whatever was trained.

Exploits need a function to be called, so a pickle that calls one by a function's name is refused
unless that one is on the list as well, even though the call would do nothing: `os.system`,
`builtins.eval`, `torch.hub.load`. So is an extension code, which means what a process registered.
"""

from __future__ import annotations

import argparse
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from reprlib import repr as brief
from types import FunctionType
from typing import Any, ClassVar, Final, Never, Self

from bridge.dtypes import Dtype, dtype_named
from bridge.errors import CorruptFileError, DtypeMismatchError
from bridge.storage.pickle_names import (
    PYTHON2_NAMES,
    STORAGE_DTYPES,
    may_be_called,
    metadata_allows,
    object_allows,
    tensor_allows,
)
from bridge.storage.pickle_scan import refuse_bombs, refuse_keys, refuse_repetition
from bridge.tiling import Shape

# What a damaged or hostile pickle makes `pickle.Unpickler` raise; nothing of it runs foreign code.
_PICKLE_ERRORS: Final = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


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
class _Storage:
    """What a persistent id names. `dtype` is None for untyped storages, which count bytes."""

    dtype: Dtype | None
    key: str
    numel: int

    __setstate__ = _no_state


class _Call:
    """A function of ours, of which a pickle gets nothing but what it returns."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *args: object) -> object:
        return self._function(*args)

    __setstate__ = _no_state


def _set_names(space: argparse.Namespace, state: object) -> None:
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
    storage: _Storage, offset: int, size: Shape, stride: Shape, *rest: object
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


_TENSORS: Final[dict[tuple[str, str], object]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): _size,
    ("collections", "OrderedDict"): _ordered,
}
_OBJECTS: Final[dict[tuple[str, str], object]] = {
    **_TENSORS,
    ("argparse", "Namespace"): argparse.Namespace,
    ("collections", "defaultdict"): _plain_dict,
    ("collections", "Counter"): _plain_dict,
    ("builtins", "set"): _set,
    ("builtins", "frozenset"): _frozenset,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, data: bytes, known: dict[tuple[str, str], object], allows: Callable[[str, str], bool]
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._known = known
        self._allows = allows
        self._inert: dict[tuple[str, str], type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - as the base class
        module = PYTHON2_NAMES.get(module, module)
        # A pickle can set the state of whatever it gets, so it gets things of this load alone.
        known = self._known.get((module, name))
        if isinstance(known, FunctionType):
            return _Call(known)
        if known is argparse.Namespace:
            return type("Namespace", (argparse.Namespace,), {"__setstate__": _set_names})
        if known is not None:
            return known
        if module == "torch":
            try:
                return replace(dtype_named(name))
            except DtypeMismatchError:
                pass  # another thing of torch's: allowed as inert, or not
        if not self._allows(module, name):
            raise CorruptFileError(f"its pickle names {module}.{name}, which no checkpoint needs")
        if (module, name) not in self._inert:
            said = {
                "module": module,
                "qualname": name,
                "may_be_called": may_be_called(module, name),
            }
            self._inert[module, name] = type("Inert", (Inert,), said)
        return self._inert[module, name]

    def persistent_load(self, pid: object) -> _Storage:
        match pid:
            case ("storage", type() as kind, str() as key, str(), int() as numel) if (
                issubclass(kind, Inert) and numel >= 0
            ):
                if kind.qualname in STORAGE_DTYPES:
                    return _Storage(dtype_named(STORAGE_DTYPES[kind.qualname]), key, numel)
                if kind.qualname == "UntypedStorage":
                    return _Storage(None, key, numel)
                raise DtypeMismatchError(f"a tensor in an unknown storage {kind.qualname!r}")
            case _:
                raise ValueError(f"not a storage: {brief(pid)}")


def _load(
    data: bytes,
    known: dict[tuple[str, str], object],
    allows: Callable[[str, str], bool],
    where: str,
) -> object:
    try:
        refuse_bombs(data)
        value = _Unpickler(data, known, allows).load()
        refuse_repetition(value)
    except (CorruptFileError, DtypeMismatchError) as error:
        hint = "do not load this file with anything that runs pickles: it may be hostile"
        is_hostile = isinstance(error, CorruptFileError)
        raise type(error)(
            error.message, where=where, hint=hint if is_hostile else error.hint
        ) from None
    except _PICKLE_ERRORS as error:
        raise CorruptFileError(
            f"its pickle cannot be read: {type(error).__name__}: {error}",
            where=where,
            hint="copy or download the file again",
        ) from None
    return value


def unpickle_metadata(data: bytes, *, where: str) -> object:
    """Read a `.metadata` file's pickle; every object in it is `Inert`, sizes are tuples.

    Raises:
        CorruptFileError: BR302, not a pickle, or one that names anything but what
            torch.distributed.checkpoint and Megatron-Core write there.
    """
    return _load(data, {("torch", "Size"): _size}, metadata_allows, where)


def unpickle_object(data: bytes, *, where: str) -> object:
    """Read the pickle of `common.pt` or of a stored object.

    Containers, numbers, strings, `argparse.Namespace` and sizes are themselves, dtypes are
    `Dtype`, tensors are `StoredTensor`; instances of any other package's classes are `Inert`.

    Raises:
        CorruptFileError: BR302, not a pickle, or one that names what Python's own library has, or
            that calls a function.
        DtypeMismatchError: BR303, a tensor of a dtype the bridge does not know.
    """
    return _load(data, _OBJECTS, object_allows, where)


def unpickle_tensor(data: bytes, *, where: str) -> StoredTensor:
    """Read the pickle of one saved tensor.

    Raises:
        CorruptFileError: BR302, not a pickle, or of anything but a tensor.
        DtypeMismatchError: BR303, a dtype the bridge does not know.
    """
    value = _load(data, _TENSORS, tensor_allows, where)
    if not isinstance(value, StoredTensor):
        raise CorruptFileError(f"holds {type(value).__name__}, not a tensor", where=where)
    return value
