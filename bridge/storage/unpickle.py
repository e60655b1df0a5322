"""Reading pickles without running them.

Megatron's `.metadata`, `common.pt` and tensor records are pickles, and a pickle is a program. The
unpicklers here import nothing. There are two lists, and both are of what is allowed:

- What becomes a real object: numbers, text and containers; `argparse.Namespace`, `OrderedDict`,
  sets; torch's sizes and dtypes; tensors as descriptions of where they lie. A closed table,
  `bridge.storage.pickle_objects`.
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
from collections.abc import Callable, Mapping
from dataclasses import replace
from reprlib import repr as brief
from types import FunctionType
from typing import Any, Final

from bridge.dtypes import dtype_named
from bridge.errors import CorruptFileError, DtypeMismatchError
from bridge.storage.pickle_names import (
    PYTHON2_NAMES,
    STORAGE_DTYPES,
    may_be_called,
    metadata_allows,
    object_allows,
    tensor_allows,
)
from bridge.storage.pickle_objects import (
    METADATA,
    OBJECTS,
    TENSORS,
    Call,
    Inert,
    Storage,
    StoredTensor,
    set_names,
)
from bridge.storage.pickle_scan import refuse_bombs, refuse_repetition

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


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        data: bytes,
        known: Mapping[tuple[str, str], object],
        allows: Callable[[str, str], bool],
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
            return Call(known)
        if known is argparse.Namespace:
            return type("Namespace", (argparse.Namespace,), {"__setstate__": set_names})
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

    def persistent_load(self, pid: object) -> Storage:
        match pid:
            case ("storage", type() as kind, str() as key, str(), int() as numel) if (
                issubclass(kind, Inert) and numel >= 0
            ):
                if kind.qualname in STORAGE_DTYPES:
                    return Storage(dtype_named(STORAGE_DTYPES[kind.qualname]), key, numel)
                if kind.qualname == "UntypedStorage":
                    return Storage(None, key, numel)
                raise DtypeMismatchError(f"a tensor in an unknown storage {kind.qualname!r}")
            case _:
                raise ValueError(f"not a storage: {brief(pid)}")


def _load(
    data: bytes,
    known: Mapping[tuple[str, str], object],
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
    return _load(data, METADATA, metadata_allows, where)


def unpickle_object(data: bytes, *, where: str) -> object:
    """Read the pickle of `common.pt` or of a stored object.

    Containers, numbers, strings, `argparse.Namespace` and sizes are themselves, dtypes are
    `Dtype`, tensors are `StoredTensor`; instances of any other package's classes are `Inert`.

    Raises:
        CorruptFileError: BR302, not a pickle, or one that names what Python's own library has, or
            that calls a function.
        DtypeMismatchError: BR303, a tensor of a dtype the bridge does not know.
    """
    return _load(data, OBJECTS, object_allows, where)


def unpickle_tensor(data: bytes, *, where: str) -> StoredTensor:
    """Read the pickle of one saved tensor.

    Raises:
        CorruptFileError: BR302, not a pickle, or of anything but a tensor.
        DtypeMismatchError: BR303, a dtype the bridge does not know.
    """
    value = _load(data, TENSORS, tensor_allows, where)
    if not isinstance(value, StoredTensor):
        raise CorruptFileError(f"holds {type(value).__name__}, not a tensor", where=where)
    return value
