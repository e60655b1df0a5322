"""Errors: their shape on screen, their codes, their trip between processes."""

from __future__ import annotations

import copy
import pickle

import pytest

from bridge import errors
from bridge.dtypes import dtype_from_safetensors, dtype_named
from bridge.errors import AccountingError, BridgeError, DtypeMismatchError, TensorParallelError

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, BridgeError)
]


def test_an_error_prints_code_places_and_help() -> None:
    """One line of code and message, one per place, one of help: the documented diagnostic."""
    error = TensorParallelError(
        "num_query_groups=8 is neither a multiple nor a divisor of tensor_model_parallel_size=3",
        where=("config.json: block_configs[17].attention", "config.json: block_configs[18]"),
        hint="choose tensor_model_parallel_size from {1, 2, 4, 8, 16}",
    )
    assert str(error) == (
        "BR201 num_query_groups=8 is neither a multiple nor a divisor of "
        "tensor_model_parallel_size=3\n"
        "  --> config.json: block_configs[17].attention\n"
        "  --> config.json: block_configs[18]\n"
        "help: choose tensor_model_parallel_size from {1, 2, 4, 8, 16}"
    )


def test_an_error_without_place_or_hint_is_one_line() -> None:
    """Nothing is printed for what is not given."""
    assert str(BridgeError("it broke")) == "BR000 it broke"


def test_a_single_place_is_one_place() -> None:
    """A string for `where` is a place, not a sequence of letters."""
    assert BridgeError("x", where="config.json").where == ("config.json",)


def test_an_empty_place_is_no_place() -> None:
    """A caller that knows no place leaves no bare arrow behind."""
    assert str(BridgeError("x", where="")) == str(BridgeError("x", where=["", ""])) == "BR000 x"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling_and_copying(kind: type[BridgeError]) -> None:
    """Rank processes send errors home whole: class, message, places and hint."""
    error = kind("what", where=("here", "there"), hint="how")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301  # our own bytes
        assert type(again) is kind
        assert (again.message, again.where, again.hint) == ("what", ("here", "there"), "how")
        assert str(again) == str(error)


def test_codes_are_unique_and_well_formed() -> None:
    """A code names one class, in the hundred of its family, for as long as scripts match on it."""
    codes = [kind.code for kind in KINDS]
    assert len(set(codes)) == len(codes)
    assert all(len(code) == 5 and code.startswith("BR") and code[2:].isdigit() for code in codes)
    families = {"BR1": errors.ConfigError, "BR2": errors.LayoutError, "BR3": errors.CheckpointError}
    for kind in KINDS:
        family = families.get(kind.code[:3])
        assert family is None or issubclass(kind, family)


def test_codes_and_exit_statuses_are_the_published_ones() -> None:
    """Codes are stable: changing one breaks whoever matches on it."""
    published = {kind.__name__: (kind.code, kind.exit_code) for kind in KINDS}
    assert published == {
        "BridgeError": ("BR000", 2),
        "UsageError": ("BR001", 2),
        "ConfigError": ("BR100", 2),
        "UnsupportedArchitectureError": ("BR101", 2),
        "UnmappedFieldError": ("BR102", 2),
        "UnsupportedFieldError": ("BR103", 2),
        "InconsistentConfigError": ("BR104", 2),
        "RemoteCodeError": ("BR105", 2),
        "LayoutError": ("BR200", 2),
        "TensorParallelError": ("BR201", 2),
        "PipelineParallelError": ("BR202", 2),
        "NoLayoutFitsError": ("BR203", 2),
        "CheckpointError": ("BR300", 2),
        "AccountingError": ("BR301", 2),
        "CorruptFileError": ("BR302", 2),
        "DtypeMismatchError": ("BR303", 2),
        "ResumeError": ("BR306", 2),
        "UnsafeFileError": ("BR307", 2),
        "TargetExistsError": ("BR304", 2),
        "VerificationError": ("BR305", 1),
        "PlanError": ("BR400", 3),
        "EnvironmentMissingError": ("BR500", 3),
        "WorkerLostError": ("BR501", 3),
        "DisagreementError": ("BR502", 2),
    }


def test_an_error_is_caught_as_its_family() -> None:
    """`except CheckpointError` is enough for whatever is wrong with a checkpoint."""
    with pytest.raises(errors.CheckpointError):
        raise AccountingError("x")


@pytest.mark.parametrize(
    ("name", "code", "itemsize"),
    [
        ("float64", "F64", 8), ("float32", "F32", 4), ("float16", "F16", 2),
        ("bfloat16", "BF16", 2), ("float8_e4m3fn", "F8_E4M3", 1), ("float8_e5m2", "F8_E5M2", 1),
        ("int64", "I64", 8), ("int32", "I32", 4), ("int16", "I16", 2), ("int8", "I8", 1),
        ("uint8", "U8", 1), ("bool", "BOOL", 1),
    ],
)  # fmt: skip
def test_dtypes_go_by_both_their_names(name: str, code: str, itemsize: int) -> None:
    """Torch's name, with or without its prefix, and safetensors' code mean one dtype."""
    dtype = dtype_named(name)
    assert dtype is dtype_named(f"torch.{name}") is dtype_from_safetensors(code)
    assert (dtype.itemsize, dtype.word.itemsize, dtype.word.kind) == (itemsize, itemsize, "u")
    assert dtype.word.byteorder in "<|="


def test_unknown_dtypes_are_refused_with_the_known_ones_named() -> None:
    """A dtype the bridge does not know is an error that lists those it does."""
    with pytest.raises(DtypeMismatchError, match="complex64") as named:
        dtype_named("complex64", where="w")
    assert named.value.where == ("w",)
    assert named.value.hint is not None
    assert "bfloat16" in named.value.hint
    with pytest.raises(DtypeMismatchError, match="F4") as coded:
        dtype_from_safetensors("F4", where="f")
    assert coded.value.hint is not None
    assert "BF16" in coded.value.hint


def test_a_thousand_places_are_a_screenful_and_a_count() -> None:
    """Nobody reads 1,000 lines; the instance still holds them all."""
    error = BridgeError("broken", where=[f"block {index}" for index in range(1000)])
    lines = str(error).splitlines()
    assert len(lines) == 52
    assert lines[-1] == "  ... and 950 more"
    assert len(error.where) == 1000
