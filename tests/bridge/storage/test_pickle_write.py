"""Pickles written by name are what pickle itself would have built."""

from __future__ import annotations

import argparse
import datetime as dt
import pickle
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridge.dtypes import dtype_named
from bridge.errors import PlanError
from bridge.storage.pickle_write import Call, Global, Items, New, dumps

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
    ),
)


@given(VALUES)
def test_plain_data_is_loaded_equal_by_pickle(value: object) -> None:
    """What is dumped here, the standard library loads, value and type."""
    loaded = pickle.loads(dumps(value))  # noqa: S301 - written one line above
    assert value == loaded
    assert repr(value) == repr(loaded)


def test_many_strings_are_remembered_past_the_one_byte_memo() -> None:
    """The memo's long form starts at entry 256."""
    value = [f"s{n}" for n in range(300)] * 2
    assert value == pickle.loads(dumps(value))  # noqa: S301 - written here


def test_classes_are_named_and_instances_built() -> None:
    """Namespaces, dtypes, calls and unhashable keys are what their names say."""
    value = {
        "args": argparse.Namespace(dtype=dtype_named("bfloat16"), size=3),
        "delta": Call(Global("datetime", "timedelta"), (1,)),
        "new": New(Global("argparse", "Namespace"), {"a": [1]}),
        "by_key": Items(((Call(Global("datetime", "timedelta"), (2,)), "two"),)),
    }
    expected = {
        "args": argparse.Namespace(dtype=torch.bfloat16, size=3),
        "delta": dt.timedelta(1),
        "new": argparse.Namespace(a=[1]),
        "by_key": {dt.timedelta(2): "two"},
    }
    assert expected == pickle.loads(dumps(value))  # noqa: S301 - written here


def test_equal_values_give_equal_bytes_whatever_their_identities() -> None:
    """Strings that are equal and not identical do not show, as they do in `pickle.dumps`."""
    name = "hidden_size"
    other = sys.intern("hidden") + "_size"[:]
    other = "".join(list(other))
    assert name is not other
    assert pickle.dumps([name, name]) != pickle.dumps([name, other])
    assert dumps([name, name]) == dumps([name, other])


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", [print]])
def test_anything_but_plain_data_is_our_own_mistake(value: object) -> None:
    """What the format has no word for raises BR400."""
    with pytest.raises(PlanError, match="no plain data"):
        dumps(value)
