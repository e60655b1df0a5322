"""What a checkpoint's pickle may name: lists of what is allowed, each for one kind of file.

Nothing that is only named is ever imported, and what may not be named or called is refused.
"""

from __future__ import annotations

import sys
from typing import Final

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
# Functions of others that rebuild plain values. They stay inert, too.
_REBUILDERS: Final = frozenset(
    {
        ("numpy", "dtype"), ("numpy", "ndarray"), ("torch", "device"), ("torch", "memory_format"),
        ("torch.serialization", "_get_layout"),
        ("numpy.random._pickle", "__bit_generator_ctor"),
        ("numpy.random._pickle", "__generator_ctor"),
        ("numpy.random._pickle", "__randomstate_ctor"),
    }
    | {
        (f"numpy.{core}.multiarray", name)
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    }
)  # fmt: skip
_CALLED: Final = _HARMLESS_STDLIB | _REBUILDERS
PYTHON2_NAMES: Final = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # in protocol 2
_METADATA_PACKAGES: Final = ("torch.distributed", "megatron.core.dist_checkpointing")


def metadata_allows(module: str, name: str) -> bool:
    """Classes of `.metadata`, the save plans that Megatron-Core leaves in it included."""
    return (
        any(module == package or module.startswith(f"{package}.") for package in _METADATA_PACKAGES)
        or module == "torch"
        or (module, name) == ("torch.serialization", "_get_layout")
        or (module in {"pathlib", "pathlib._local"} and (module, name) in _HARMLESS_STDLIB)
    )


def object_allows(module: str, name: str) -> bool:
    """Any class of any package: arguments hold enums and functions of whatever was trained."""
    if (module, name) in _HARMLESS_STDLIB:
        return True
    root = module.partition(".")[0]
    return root not in sys.stdlib_module_names and root not in {"__main__", "commands"}


def may_be_called(module: str, name: str) -> bool:
    """Whether a name is a class's, by its capital, or that of a function on the list."""
    last = name.rpartition(".")[2].lstrip("_")
    return (
        last[:1].isupper()
        or (module, name) in _CALLED
        or (module in {"torch._utils", "torch._tensor"} and name.startswith("_rebuild_"))
    )


def tensor_allows(module: str, name: str) -> bool:
    """Storages, which the record of a tensor names as the place of its elements."""
    return (module == "torch" and name in STORAGE_DTYPES) or (
        (module, name) == ("torch.storage", "UntypedStorage")
    )
