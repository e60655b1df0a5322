"""A tokenizer that is a link to somewhere else is not given to transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.errors import UnsafeFileError
from bridge.generation.text import Tokenizer


def test_a_tokenizer_that_is_a_link_out_is_refused(tmp_path: Path) -> None:
    """Transformers would open it by itself, wherever it leads."""
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeFileError, match="a link leads out"):
        Tokenizer(tmp_path / "model")
