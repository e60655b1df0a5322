"""What the live laws do inside rank processes; a module, because ranks import it by name."""

from __future__ import annotations

from harness.compare import words_of
from harness.live import ModelRequest, build, fill, live_tensors
from harness.ranks import RankContext


def both_ways(
    _context: RankContext, hf: ModelRequest, megatron: ModelRequest
) -> tuple[list[str], int]:
    """Names of parameters whose bits depend on the checkpoint's format; how many were compared."""
    loaded = []
    for request in (hf, megatron):
        parts = build(request)
        fill(parts, request)
        loaded.append({one.name: words_of(one.tensor) for one in live_tensors(parts)})
    ours, theirs = loaded
    different = [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours
        or name not in theirs
        or ours[name].shape != theirs[name].shape
        or (ours[name] != theirs[name]).any()
    ]
    return different, len(ours)
