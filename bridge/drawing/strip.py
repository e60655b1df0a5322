"""The blocks of a model as lines of text, one character a block, within 80 columns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Final

from rich.text import Text

from bridge.drawing.architecture import Architecture, SubBlock

_COLUMNS: Final = 80
_BLOCKS_PER_ROW: Final = 60
_TICK: Final = 10
_MARGIN: Final = 10
"""Columns for the names of rows."""
_BARS: Final = "▁▂▃▄▅▆▇█"
_RANKS: Final = digits + ascii_lowercase + ascii_uppercase
_OTHER: Final[Mapping[str, str]] = {"linear": "-", "no_op": "."}
_COLOURS: Final[Mapping[str, str]] = {"linear": "yellow", "no_op": "bright_black"}
_LETTERS: Final = len(ascii_lowercase + ascii_uppercase)
_ATTENTION, _FFN, _RANK = "blue", "cyan", "magenta"


def strip(found: Architecture, *, ascii_only: bool) -> Text:
    """Draw the blocks in rows of equal length, with a legend.

    Args:
        found: What to draw; pipeline ranks only where the layout has several.
        ascii_only: Leave out the bars, which are not ASCII; letters say the widths in any case.

    Returns:
        Lines of at most 80 columns. Colours only repeat what characters say.
    """
    attention = _symbols((one.attention for one in found.blocks), _groups_symbol)
    ffn = _symbols((one.ffn for one in found.blocks), _width_symbol)
    widest = max(one.ffn.size for one in found.blocks)
    ranks = _ranks(found)
    text = Text()
    for row in _rows(len(found.blocks)):
        blocks = found.blocks[row.start : row.stop]
        text.append(_label("layer") + _axis(row) + "\n", "bright_black")
        text.append_text(
            _line("attention", [(attention[one.attention], one.attention) for one in blocks],
                  _ATTENTION)
        )  # fmt: skip
        if not ascii_only:
            bars = [(_bar(one.ffn, widest), one.ffn) for one in blocks]
            text.append_text(_line("", bars, _FFN))
        text.append_text(_line("ffn", [(ffn[one.ffn], one.ffn) for one in blocks], _FFN))
        if len(set(ranks)) > 1:
            text.append(_label("pp rank"))
            text.append("".join(ranks[row.start : row.stop]) + "\n", _RANK)
        text.append("\n")
    text.append_text(_legend(found, attention, ffn))
    return text


def _rows(num_layers: int) -> Iterator[range]:
    """Rows as long as one another, in whole ticks."""
    rows = math.ceil(num_layers / _BLOCKS_PER_ROW)
    length = _TICK * math.ceil(num_layers / rows / _TICK)
    for start in range(0, num_layers, length):
        yield range(start, min(start + length, num_layers))


def _symbols(found: Iterable[SubBlock], symbol: Callable[[int, int], str]) -> dict[SubBlock, str]:
    """A character for each kind and size, the sizes in ascending order."""
    kinds = set(found)
    sizes = sorted(one.size for one in kinds if one.kind == "full")
    symbols = {SubBlock("full", size): symbol(size, place) for place, size in enumerate(sizes)}
    return symbols | {one: _OTHER[one.kind] for one in kinds if one.kind != "full"}


def _groups_symbol(size: int, place: int) -> str:
    return str(size) if size < 10 else (ascii_uppercase + ascii_lowercase)[place % _LETTERS]


def _width_symbol(_size: int, place: int) -> str:
    return (ascii_lowercase + ascii_uppercase)[place % _LETTERS]


def _bar(ffn: SubBlock, widest: int) -> str:
    """By the square root, as in the figure, so that the narrow ones differ beside a fused one."""
    if ffn.kind != "full":
        return _OTHER[ffn.kind]
    return _BARS[min(7, math.floor(8 * math.sqrt(ffn.size / widest)))]


def _label(name: str) -> str:
    return name.ljust(_MARGIN)


def _axis(row: range) -> str:
    return "".join(str(layer_idx).ljust(_TICK) for layer_idx in row[::_TICK]).rstrip()


def _line(name: str, symbols: Sequence[tuple[str, SubBlock]], colour: str) -> Text:
    text = Text(_label(name))
    for symbol, one in symbols:
        text.append(symbol, _COLOURS.get(one.kind, colour))
    return text.append("\n")


def _ranks(found: Architecture) -> list[str]:
    return [
        _RANKS[stage.pp_rank % len(_RANKS)]
        for stage in found.stages
        for _ in range(stage.num_layers)
    ]


def _legend(
    found: Architecture, attention: Mapping[SubBlock, str], ffn: Mapping[SubBlock, str]
) -> Text:
    text = Text()
    for title, halves, symbols, unit, colour in (
        ("attention", [one.attention for one in found.blocks], attention, " groups", _ATTENTION),
        ("ffn", [one.ffn for one in found.blocks], ffn, "", _FFN),
    ):
        names = {"linear": "one matrix", "no_op": "none"}
        items = [
            (symbols[one], f"={names.get(one.kind, f'{one.size}{unit}')} ({count})", one)
            for one, count in sorted(
                Counter(halves).items(), key=lambda item: (item[0].kind, item[0].size)
            )
        ]
        text.append_text(_items(title, items, colour))
    notes = "(number of blocks); an ffn is named by its hidden width"
    if len({stage.pp_rank for stage in found.stages}) > len(digits):
        notes += f";\n{_label('')}pp ranks go on with a-z, A-Z, and then from 0 again"
    if max(len(attention), len(ffn)) > _LETTERS:
        notes += f";\n{_label('')}there are more sizes than letters: some letters stand for several"
    return text.append(_label("") + notes + "\n", "bright_black")


def _items(title: str, items: Sequence[tuple[str, str, SubBlock]], colour: str) -> Text:
    """Wrap a legend's items, none of them broken."""
    text, used = Text(_label(title)), _MARGIN
    for symbol, words, one in items:
        length = len(symbol) + len(words) + 2
        if used > _MARGIN:
            if used + length > _COLUMNS:
                text.append("\n" + _label(""))
                used = _MARGIN
            else:
                text.append("  ")
        text.append(symbol, _COLOURS.get(one.kind, colour))
        text.append(words)
        used += length
    return text.append("\n")
