"""What a check found, and how two sets of tensors are compared bit by bit.

Comparing nothing is a failure, never a pass: whoever builds a `Finding` says how many things were
compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

Words = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]
_MAX_PLACES: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The outcome of one check on one case.

    Args:
        passed: The verdict.
        summary: One line, with value and limit.
        value: What was measured, where there is one number that says it.
        limit: The largest value that passes.
        unit: Of both, in words.
        places: On failure, where: tensor, tile, element, as precisely as is known; worst first.
        details: Anything else for the evidence, plain data.
    """

    passed: bool
    summary: str
    value: float | None = None
    limit: float | None = None
    unit: str = ""
    places: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


def exact(
    problems: Sequence[str], *, compared: int, what: str, details: Mapping[str, Any] | None = None
) -> Finding:
    """A finding where any difference fails.

    Args:
        problems: Every difference, worst or first one first.
        compared: How many things were held against each other; none is a failure too.
        what: What those things are, plural.
        details: For the evidence.
    """
    if problems:
        return Finding(
            passed=False,
            summary=f"{len(problems)} difference{'s' if len(problems) > 1 else ''} in "
            f"{compared:,} {what} (limit 0): {problems[0]}",
            value=len(problems),
            limit=0,
            unit="differences",
            places=tuple(problems[:_MAX_PLACES]),
            details=details or {},
        )
    return Finding(
        passed=compared > 0,
        summary=f"{compared:,} {what}, 0 differences (limit 0)"
        if compared
        else f"0 {what}: nothing was compared",
        value=0,
        limit=0,
        unit="differences",
        details=details or {},
    )


def words_of(tensor: Any) -> Words:  # noqa: ANN401 - a torch tensor; torch is not imported here
    """A tensor's bit patterns as unsigned words; bfloat16 and NaN payloads included."""
    import torch

    kind: torch.dtype = getattr(torch, f"int{8 * tensor.element_size()}")
    signed = tensor.detach().cpu().contiguous().view(kind).numpy()
    found: Words = signed.view(np.dtype(f"u{tensor.element_size()}"))
    return found


def first_difference(ours: Words, theirs: Words) -> tuple[tuple[int, ...], int] | None:
    """Index of the first element whose bits differ and how many do; None when all are equal."""
    different = ours != theirs
    count = int(np.count_nonzero(different))
    if not count:
        return None
    index = np.unravel_index(int(np.argmax(different)), different.shape)
    return tuple(int(i) for i in index), count


def read_safetensors(directory: Path) -> Mapping[str, Any]:
    """Every tensor of a checkpoint directory, lazily, by the reference implementation's reader.

    Deliberately not the bridge's own: it is one of the things under test.
    """
    return _Safetensors(directory)


class _Safetensors(Mapping[str, Any]):
    def __init__(self, directory: Path) -> None:
        from safetensors import safe_open

        self._files: dict[str, Any] = {}
        for path in sorted(directory.glob("*.safetensors")):
            handle: Any = safe_open(path, framework="pt")
            names: list[str] = handle.keys()
            self._files |= dict.fromkeys(names, handle)

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - a torch tensor
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Any:  # noqa: ANN401 - an iterator of names
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def rows(self, name: str) -> Any:  # noqa: ANN401 - safetensors' slice object
        """A lazy slice: only what is indexed is read."""
        return self._files[name].get_slice(name)


def bfloat16_numbers(words: Words) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The numbers whose bfloat16 words these are, exactly."""
    return np.left_shift(words, np.uint32(16), dtype=np.uint32).view(np.float32)


class NumberRows:
    """A stored tensor as the oracle wants it: rows on demand, as float32 or float64 numbers."""

    def __init__(self, stored: Any) -> None:  # noqa: ANN401 - safetensors' slice object
        self._stored = stored
        self.shape: tuple[int, ...] = tuple(stored.get_shape())

    def __getitem__(self, rows: slice) -> np.ndarray[Any, np.dtype[np.floating[Any]]]:
        """Rows, exact: bfloat16 as float32, any other dtype as it is.

        By NumPy, in the calling thread: the oracle's threads would each start as many of torch's.
        """
        import torch

        piece = self._stored[rows]
        if piece.dtype == torch.bfloat16:
            return bfloat16_numbers(piece.view(torch.uint16).numpy())
        found: np.ndarray[Any, np.dtype[np.floating[Any]]] = piece.numpy()
        return found


def oracle_weights(directory: Path) -> Any:  # noqa: ANN401 - harness.oracle.Weight
    """The weights of a checkpoint by name, for `harness.oracle.forward`."""
    source = _Safetensors(directory)
    return lambda name: NumberRows(source.rows(name))


def tensor_differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], *, names: tuple[str, str]
) -> tuple[list[str], list[tuple[str, tuple[int, ...]]], int]:
    """Hold two sets of tensors against each other: names, shapes, dtypes, bits.

    Args:
        ours: Name to tensor.
        theirs: Name to tensor.
        names: What to call the two.

    Returns:
        Every difference in words, the first differing element of each tensor that has one, and
        how many elements were compared.
    """
    problems = [
        *(f"{name}: only in {names[0]}" for name in sorted(ours.keys() - theirs.keys())),
        *(f"{name}: only in {names[1]}" for name in sorted(theirs.keys() - ours.keys())),
    ]
    elements: list[tuple[str, tuple[int, ...]]] = []
    compared = 0
    for name in _in_model_order(ours.keys() & theirs.keys()):
        a, b = ours[name], theirs[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            problems.append(
                f"{name}: {tuple(a.shape)} {a.dtype} in {names[0]}, "
                f"{tuple(b.shape)} {b.dtype} in {names[1]}"
            )
            continue
        compared += a.numel()
        found = first_difference(words_of(a), words_of(b))
        if found is not None:
            index, count = found
            elements.append((name, index))
            problems.append(f"{name}{list(index)}: {count} elements differ, this one first")
    return problems, elements, compared


def _in_model_order(names: Iterable[str]) -> list[str]:
    """Layer 2 before layer 10; the embedding first."""

    def key(name: str) -> tuple[bool, list[tuple[int, str]]]:
        parts = [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
        return not name.startswith(("model.embed", "embedding")), parts

    return sorted(names, key=key)
