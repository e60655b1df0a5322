"""CRC-32: the one of zip archives, whole or put together from pieces."""

from __future__ import annotations

import importlib
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge import checksums


@given(st.binary(max_size=300), st.integers(0, 2**32 - 1))
def test_the_checksum_is_that_of_zlib(data: bytes, start: int) -> None:
    """Whichever library computes it, from any value on."""
    assert checksums.crc32(data, start) == zlib.crc32(data, start)


@given(st.lists(st.binary(max_size=200), max_size=6))
def test_pieces_combine_to_the_checksum_of_the_whole(parts: list[bytes]) -> None:
    """Pieces in a row, empty ones too, each checksummed from zero."""
    combined = 0
    for part in parts:
        combined = checksums.combine_crc32(combined, zlib.crc32(part), len(part))
    assert combined == zlib.crc32(b"".join(parts))


@pytest.mark.parametrize("nbytes", [(1 << 20) - 1, 1 << 20, (5 << 20) + 3])
def test_long_pieces_combine_too(nbytes: int) -> None:
    """Every bit of the length counts."""
    first, second = b"left", bytes(range(256)) * (nbytes // 256 + 1)
    second = second[:nbytes]
    combined = checksums.combine_crc32(zlib.crc32(first), zlib.crc32(second), nbytes)
    assert combined == zlib.crc32(first + second)


def test_zlib_serves_where_the_faster_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is a matter of speed only."""
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "zlib_ng", None)
        without.setitem(sys.modules, "zlib_ng.zlib_ng", None)
        assert importlib.reload(checksums).crc32 is zlib.crc32
    importlib.reload(checksums)
