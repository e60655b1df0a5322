"""Colours of the figures, those of the HTML report: light paper and dark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from bridge.drawing.figure import Style

LIGHT: Final[Mapping[Style, str]] = {
    "paper": "#ffffff", "ink": "#1b1f24", "soft": "#5b6570", "rule": "#e3e7eb", "band": "#f0f3f6",
    "attention": "#1f5fbf", "ffn": "#0f7f77", "linear": "#c98a2b", "no_op": "#b4bcc5",
    "edge": "#8f6bb8", "stage": "#6b7785",
}  # fmt: skip
DARK: Final[Mapping[Style, str]] = {
    "paper": "#12161b", "ink": "#e4e9ee", "soft": "#97a3b0", "rule": "#2b333c", "band": "#1c232b",
    "attention": "#7fb0ff", "ffn": "#5fd3c8", "linear": "#d99f45", "no_op": "#56606b",
    "edge": "#b08fd8", "stage": "#8793a1",
}  # fmt: skip
