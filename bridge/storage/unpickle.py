"""Reading pickles without running them.

Megatron's `.metadata`, `common.pt` and tensor records are pickles, and a pickle is a program. The
unpicklers here import nothing: every global is looked up in a closed table, or turned into an
`Inert` class that remembers what it was called with and does nothing. What a checkpoint has no
business naming (`os.system`, `builtins.eval`) is refused before anything is built from it.
"""

from __future__ import annotations

import argparse
import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType
from typing import Any, ClassVar, Final, Never, Self

from bridge.dtypes import Dtype, dtype_named
from bridge.errors import CorruptFileError, DtypeMismatchError
from bridge.storage.pickle_scan import refuse_bombs
from bridge.tiling import Shape

STORAGE_DTYPES: Final = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
"""torch's legacy storage classes; newer dtypes are saved as `torch.storage.UntypedStorage`."""

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

    args: tuple[object, ...]
    state: object
    items: list[object]

    def __new__(cls, *args: object, **_: object) -> Self:
        """Remember the arguments; accept any."""
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
        return f"<{self.module}.{self.qualname}{self.args!r}>"

    def is_a(self, *qualnames: str) -> bool:
        """Whether the pickle named it so, whichever module it lives in."""
        return self.qualname in qualnames

    def field(self, name: str) -> object:
        """A field of a plain object; None when it has no such field."""
        return self.state.get(name) if isinstance(self.state, dict) else None


def _no_state(_: object, state: object) -> Never:
    """Be `__setstate__` of what is checked when built, so that no pickle changes it afterwards."""
    raise ValueError(f"a state for a tensor: {state!r}")


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


def _integers(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(v) is int and v >= 0 for v in values):
        raise ValueError(f"not sizes: {values!r}")
    return values


def _size(values: Sequence[int] = ()) -> tuple[int, ...]:
    return _integers(tuple(values))


def _tensor(
    storage: _Storage, offset: int, size: Shape, stride: Shape, *rest: object
) -> StoredTensor:
    """Stand in for `torch._utils._rebuild_tensor_v2`, and `_v3`, which also names the dtype."""
    dtype = storage.dtype or (rest[2] if len(rest) > 2 else None)
    if not isinstance(dtype, Dtype):
        raise DtypeMismatchError(f"a tensor of unknown dtype {getattr(dtype, 'qualname', dtype)!r}")
    shape, strides = _integers(size), _integers(stride)
    if type(offset) is not int or offset < 0 or len(shape) != len(strides):
        raise ValueError(f"not a tensor: offset {offset!r}, size {size!r}, stride {stride!r}")
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
        raise ValueError(f"not bytes: {encoding!r}")
    return text.encode("latin1")


def _plain_dict(*args: object) -> dict[object, object]:
    return dict(args[-1]) if args and isinstance(args[-1], dict) else {}


_TENSORS: Final[dict[tuple[str, str], object]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): _size,
    ("collections", "OrderedDict"): OrderedDict,
}
_OBJECTS: Final[dict[tuple[str, str], object]] = {
    **_TENSORS,
    ("argparse", "Namespace"): argparse.Namespace,
    ("collections", "defaultdict"): _plain_dict,
    ("collections", "Counter"): _plain_dict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("_codecs", "encode"): _encode,
}
# Standard-library names that real training arguments hold. They stay inert like everything else.
_HARMLESS_STDLIB: Final = frozenset(
    {
        ("builtins", name)
        for name in (
            *("bool", "bytearray", "bytes", "complex", "dict", "float", "getattr"),
            *("int", "list", "object", "slice", "str", "tuple"),
        )
    }
    | {("_io", "BytesIO"), ("io", "BytesIO"), ("collections", "deque"), ("functools", "partial")}
    | {("copyreg", "_reconstructor"), ("copyreg", "__newobj__"), ("types", "SimpleNamespace")}
    | {("signal", "Signals"), ("uuid", "UUID"), ("decimal", "Decimal")}
    | {("datetime", name) for name in ("date", "datetime", "time", "timedelta", "timezone")}
    | {
        (module, f"{kind}{name}")
        for module in ("pathlib", "pathlib._local")
        for kind in ("", "Pure")
        for name in ("Path", "PosixPath", "WindowsPath")
    }
)
_PYTHON2_NAMES: Final = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # in protocol 2
_METADATA_PACKAGES: Final = ("torch.distributed", "megatron.core.dist_checkpointing")


def _metadata_allows(module: str, name: str) -> bool:
    """Classes of `.metadata`, the save plans that Megatron-Core leaves in it included."""
    return (
        any(module == package or module.startswith(f"{package}.") for package in _METADATA_PACKAGES)
        or module == "torch"
        or (module, name) == ("torch.serialization", "_get_layout")
        or (module in {"pathlib", "pathlib._local"} and (module, name) in _HARMLESS_STDLIB)
    )


def _object_allows(module: str, name: str) -> bool:
    """Any class of any package: arguments hold enums and functions of whatever was trained."""
    if (module, name) in _HARMLESS_STDLIB:
        return True
    root = module.partition(".")[0]
    return root not in sys.stdlib_module_names and root not in {"__main__", "commands"}


def _tensor_allows(module: str, name: str) -> bool:
    return (module == "torch" and name in STORAGE_DTYPES) or (
        (module, name) == ("torch.storage", "UntypedStorage")
    )


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, data: bytes, known: dict[tuple[str, str], object], allows: Callable[[str, str], bool]
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._known = known
        self._allows = allows
        self._inert: dict[tuple[str, str], type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - as the base class
        module = _PYTHON2_NAMES.get(module, module)
        # A pickle can set the state of whatever it gets, so it gets things of this load alone.
        known = self._known.get((module, name))
        if isinstance(known, FunctionType):
            return partial(known)
        if known is argparse.Namespace:
            return type("Namespace", (argparse.Namespace,), {})
        if known is not None:
            return known
        if module == "torch":
            try:
                return replace(dtype_named(name))
            except DtypeMismatchError:
                pass  # another thing of torch's: allowed as inert, or not
        if not self._allows(module, name):
            raise CorruptFileError(f"its pickle names {module}.{name}, which no checkpoint needs")
        return self._inert.setdefault(
            (module, name), type("Inert", (Inert,), {"module": module, "qualname": name})
        )

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
                raise ValueError(f"not a storage: {pid!r}")


def _load(
    data: bytes,
    known: dict[tuple[str, str], object],
    allows: Callable[[str, str], bool],
    where: str,
) -> object:
    try:
        refuse_bombs(data)
        return _Unpickler(data, known, allows).load()
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


def unpickle_metadata(data: bytes, *, where: str) -> object:
    """Read a `.metadata` file's pickle; every object in it is `Inert`, sizes are tuples.

    Raises:
        CorruptFileError: BR302, not a pickle, or one that names anything but what
            torch.distributed.checkpoint and Megatron-Core write there.
    """
    return _load(data, {("torch", "Size"): _size}, _metadata_allows, where)


def unpickle_object(data: bytes, *, where: str) -> object:
    """Read the pickle of `common.pt` or of a stored object.

    Containers, numbers, strings, `argparse.Namespace` and sizes are themselves, dtypes are
    `Dtype`, tensors are `StoredTensor`; instances of any other package's classes are `Inert`.

    Raises:
        CorruptFileError: BR302, not a pickle, or one that names standard-library functions.
        DtypeMismatchError: BR303, a tensor of a dtype the bridge does not know.
    """
    return _load(data, _OBJECTS, _object_allows, where)


def unpickle_tensor(data: bytes, *, where: str) -> StoredTensor:
    """Read the pickle of one saved tensor.

    Raises:
        CorruptFileError: BR302, not a pickle, or of anything but a tensor.
        DtypeMismatchError: BR303, a dtype the bridge does not know.
    """
    value = _load(data, _TENSORS, _tensor_allows, where)
    if not isinstance(value, StoredTensor):
        raise CorruptFileError(f"holds {type(value).__name__}, not a tensor", where=where)
    return value
