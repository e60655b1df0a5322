"""Pickles are read, never run."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime as dt
import enum
import os
import pickle
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from bridge.dtypes import dtype_named
from bridge.errors import BridgeError, CorruptFileError, DtypeMismatchError
from bridge.storage.pickle_objects import Inert
from bridge.storage.unpickle import unpickle_metadata, unpickle_object, unpickle_tensor

READERS = [unpickle_metadata, unpickle_object, unpickle_tensor]


class Exploit:
    """What `pickle.loads` would run when it loads this."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("reader", READERS)
def test_a_pickle_that_calls_os_system_is_refused_and_not_run(
    reader: Callable[..., object], protocol: int, tmp_path: Path
) -> None:
    """What works on `pickle.loads` raises BR302 here, names the culprit and runs nothing."""
    victim = tmp_path / "victim"
    payload = pickle.dumps({"args": Exploit(os.system, f"touch {victim}")}, protocol)

    with pytest.raises(CorruptFileError, match=r"system.*no checkpoint needs") as caught:
        reader(payload, where="common.pt")

    assert not victim.exists()
    assert caught.value.where == ("common.pt",)
    pickle.loads(payload)  # noqa: S301 - the proof that the payload is a real one
    assert victim.exists()


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (eval, ("1",)),
        (exec, ("1",)),
        (__import__, ("os",)),
        (subprocess.Popen, (["true"],)),
        (open, ("/dev/null",)),
        (sys.exit, (1,)),
    ],
)
@pytest.mark.parametrize("reader", READERS)
def test_standard_library_functions_are_refused(
    reader: Callable[..., object], function: Callable[..., object], args: tuple[object, ...]
) -> None:
    """No reader accepts a standard-library name that is not plain data."""
    with pytest.raises(CorruptFileError, match="no checkpoint needs"):
        reader(pickle.dumps(Exploit(function, *args)), where="x")


def test_metadata_names_nothing_outside_torch_distributed_and_megatron() -> None:
    """`.metadata` is held to a closer list than arguments are."""
    third_party = b"\x80\x02cnumpy\nMatrix\n(K\x01tR."
    assert isinstance(unpickle_object(third_party, where="x"), Inert)
    with pytest.raises(CorruptFileError, match=r"numpy\.Matrix"):
        unpickle_metadata(third_party, where="x")


@pytest.mark.parametrize("protocol", range(2, 6))
def test_plain_values_come_back_equal(protocol: int) -> None:
    """Containers, numbers, strings, bytes, namespaces and sizes are themselves."""
    value = {
        "args": argparse.Namespace(hidden_size=4, eps=1e-5, names=["a"], none=None),
        "ordered": collections.OrderedDict(a=1),
        "default": collections.defaultdict(list, {"k": [1]}),
        "set": {1, 2},
        "bytes": b"\x00\xff",
        "size": torch.Size([2, 3]),
        -(1 << 63): ((1 << 64) - 1, True, float("inf")),
    }
    assert unpickle_object(pickle.dumps(value, protocol), where="x") == value


class Made:
    """Pickled as what a function makes of something."""

    def __init__(self, function: Callable[..., object], argument: object) -> None:
        self.call = function, (argument,)

    def __reduce__(self) -> Any:  # noqa: ANN401 - pickle's
        return self.call


def colliding(count: int) -> list[tuple[int, int]]:
    """Different pairs of numbers; that their hashes differ as well is nothing to build on."""
    return [(n, n) for n in range(count)]


@pytest.mark.parametrize(
    "value",
    [
        pytest.param((1 << 64) + 1, id="integer"),
        pytest.param(-(1 << 63) - 1, id="negative"),
        pytest.param({n * ((1 << 61) - 1): None for n in range(1000)}, id="integers"),
        pytest.param(10**4000, id="digits"),
        pytest.param(dict.fromkeys(colliding(5000)), id="dict"),
        pytest.param(set(colliding(5000)), id="set"),
        pytest.param(frozenset(colliding(5000)), id="frozenset"),
        pytest.param(Made(set, colliding(5000)), id="made-set"),
        pytest.param(Made(frozenset, colliding(5000)), id="made-frozenset"),
        pytest.param({Made(torch.Size, pair): 0 for pair in colliding(5000)}, id="sizes"),
        pytest.param({Made(frozenset, pair): 0 for pair in colliding(5000)}, id="frozensets"),
        pytest.param(
            Made(collections.OrderedDict, [(pair, 0) for pair in colliding(5000)]), id="made-dict"
        ),
    ],
)
@pytest.mark.parametrize("protocol", range(6))
def test_keys_whose_hashes_can_be_chosen_are_refused(protocol: int, value: object) -> None:
    """A dict of such takes the square of their number; and no one prints all digits."""
    data = pickle.dumps({"a": value}, protocol)
    with pytest.raises(CorruptFileError, match=r"64 bits|as keys"):
        unpickle_object(data, where="x")


@pytest.mark.parametrize("protocol", range(6))
def test_some_tuples_as_keys_are_read(protocol: int) -> None:
    """What a run may have kept there."""
    value = {"a": dict.fromkeys(colliding(1000)), "b": set(colliding(1000))}
    assert unpickle_object(pickle.dumps(value, protocol), where="x") == value


def test_no_pickle_changes_a_dtype() -> None:
    """Its state is a list of two dicts, or whatever a class takes: another name, another size."""
    for state in (b"N}X\x04\0\0\0nameX\x01\0\0\0xs\x86", b"](X\x01\0\0\0xK\x01e", b"}"):
        with pytest.raises(CorruptFileError, match="a state for bfloat16"):
            unpickle_object(b"\x80\x02ctorch\nbfloat16\n" + state + b"b.", where="x")
    found = dtype_named("bfloat16")
    assert (found.name, found.itemsize) == ("bfloat16", 2)
    assert pickle.loads(pickle.dumps(found)) is found  # noqa: S301 - ours


@pytest.mark.parametrize(
    "state",
    [
        b"N}X\x08\0\0\0__repr__X\x01\0\0\0xs\x86",
        b"N}X\x09\0\0\0__class__cmegatron.a\nB\ns\x86",
        b"}K\x01K\x02s",
    ],
    ids=["class", "slots", "name"],
)
@pytest.mark.parametrize("made", [True, False], ids=["instance", "class"])
def test_no_pickle_changes_a_namespace_s_class(state: bytes, *, made: bool) -> None:
    """How it is shown, compared or hashed, and what it is."""
    instance = b")\x81" if made else b""
    with pytest.raises(CorruptFileError, match="state"):
        unpickle_object(b"\x80\x02cargparse\nNamespace\n" + instance + state + b"b.", where="x")
    assert repr(argparse.Namespace(a=1)) == "Namespace(a=1)"


def test_no_pickle_changes_a_function() -> None:
    """Neither which one it is nor what it is given."""
    with pytest.raises(CorruptFileError, match="state"):
        unpickle_object(b"\x80\x02cbuiltins\nset\n(ccollections\nOrderedDict\n)}Ntb.", where="x")


def test_a_million_sets_are_no_checkpoint() -> None:
    """One byte each in the file, two hundred in memory."""
    data = b"\x80\x04(" + b"\x8f" * ((1 << 20) + 1) + b"l."
    with pytest.raises(CorruptFileError, match="beyond all use"):
        unpickle_object(data, where="x")


def test_dtypes_are_ours_and_foreign_instances_are_inert(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An enum of a package that is not imported keeps its name and value, and runs nothing."""
    module = types.ModuleType("megatron_made_up")

    class Backend(enum.Enum):
        flash = 1

        @classmethod
        def _missing_(cls, value: object) -> None:
            pytest.fail(f"ran with {value}")

    Backend.__module__, Backend.__qualname__ = module.__name__, "Backend"
    vars(module)["Backend"] = Backend
    monkeypatch.setitem(sys.modules, module.__name__, module)
    payload = pickle.dumps(
        {
            "dtype": torch.bfloat16,
            "backend": Backend.flash,
            "function": torch.nn.functional.silu,
            "signal": signal.SIGTERM,
            "limit": dt.timedelta(minutes=10),
            "path": Path("a"),
        }
    )
    monkeypatch.delitem(sys.modules, module.__name__)

    value = unpickle_object(payload, where="x")

    assert isinstance(value, dict)
    assert dtype_named("bfloat16") == value.pop("dtype")
    assert value["backend"].qualname == "Backend"
    assert value["backend"].args == (1,)
    assert issubclass(value.pop("function"), Inert)
    assert all(isinstance(item, Inert) for item in value.values())
    assert module.__name__ not in sys.modules


@pytest.mark.parametrize(
    "state", [b"}X\x08\x00\x00\x00itemsizeK\x01s", b"]K\x01a", b"N}X\x01\x00\x00\x00aK\x01s\x86"]
)
@pytest.mark.parametrize("name", [b"torch\nfloat32\n", b"argparse\nNamespace\n", b"torch\nSize\n"])
def test_a_pickle_cannot_change_what_later_pickles_get(name: bytes, state: bytes) -> None:
    """A state set on a global (opcode BUILD) dies with the load."""
    before = dict(vars(argparse.Namespace))
    with contextlib.suppress(CorruptFileError):
        unpickle_object(b"\x80\x02c" + name + state + b"b.", where="x")
    assert dtype_named("float32").itemsize == 4
    assert dtype_named("float32").name == "float32"
    assert before == dict(vars(argparse.Namespace))


def metadata_pickle() -> bytes:
    """Real metadata of one tensor, as torch pickles it."""
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))
    tensor = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([2, 3]), [chunk])
    return pickle.dumps(Metadata({"w": tensor}, None, {}))


def test_torch_metadata_is_read_with_sizes_and_dtypes() -> None:
    """The classes of torch.distributed.checkpoint come out as named fields."""
    root = unpickle_metadata(metadata_pickle(), where=".metadata")
    assert isinstance(root, Inert)
    assert root.is_a("Metadata")
    tensors = root.field("state_dict_metadata")
    assert isinstance(tensors, dict)
    assert tensors["w"].field("size") == (2, 3)
    assert tensors["w"].field("properties").state[0] == dtype_named("float32")


def test_a_pickle_cut_anywhere_is_corrupt() -> None:
    """Every proper prefix of a pickle raises BR302."""
    data = metadata_pickle()
    for length in range(len(data)):
        with pytest.raises(CorruptFileError):
            unpickle_metadata(data[:length], where="x")


@given(st.data())
def test_flipped_bytes_never_escape_as_other_errors(data: st.DataObject) -> None:
    """Damage gives a value or one of our errors: no crash, no foreign exception, no big memory."""
    damaged = bytearray(metadata_pickle())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    for reader in READERS:
        try:
            reader(bytes(damaged), where="x")
        except BridgeError as error:
            assert error.code in {"BR302", "BR303"}  # noqa: PT017 - a value is fine too


@pytest.mark.parametrize("index", [b"r\xff\xff\xff\x7f", b"p2147483647\n"])
def test_a_memo_index_beyond_the_pickle_is_refused(index: bytes) -> None:
    """It would make the unpickler clear 64 GiB; the refusal comes first."""
    with pytest.raises(CorruptFileError, match="memo index"):
        unpickle_object(b"\x80\x02N" + index + b".", where="x")


def test_a_tensor_of_an_unknown_dtype_is_named() -> None:
    """Complex tensors are BR303, not a crash."""
    payload = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n((X\x07\x00\x00\x00storage"
        b"ctorch.storage\nUntypedStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x08tQ"
        b"K\x00K\x01\x85K\x01\x85\x89Nctorch\ncomplex64\ntR."
    )
    with pytest.raises(DtypeMismatchError, match="complex64"):
        unpickle_object(payload, where="x")
