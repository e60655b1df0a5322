"""JSON of strangers: one meaning or none.

Python's own reader takes the last of two equal keys, takes `NaN`, turns 1e400 into infinity, and
guesses at encodings. Another reader may see another document there: transformers in `config.json`,
the safetensors library in a header. What could be read in two ways is refused.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any


def parse_json(data: bytes | str) -> Any:  # noqa: ANN401 - JSON
    """Parse one document of UTF-8, in which every key is there once and every number is finite.

    Raises:
        ValueError: Anything else: a byte order mark, half of a surrogate pair, `Infinity`,
            brackets nested deeper than Python's stack is.
    """
    text = data if isinstance(data, str) else data.decode("utf-8")
    try:
        found = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\ud" in text or "\\uD" in text:
        json.dumps(found, ensure_ascii=False).encode()  # raises for half a pair
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        repeated = sorted(key for key, count in counts.items() if count > 1)
        raise ValueError(f"repeated key {', '.join(repeated)}")
    return found


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is beyond any float")
    return number
