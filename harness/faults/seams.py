"""How faults get in: another table, other tiles, other functions, other live weights.

Every helper gives a picklable callable, since faults travel to rank processes; so what they are
given are functions of a module, never lambdas.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np

from bridge import parameters
from bridge.parameters import Parameter
from bridge.spec import ModelSpec
from bridge.tiling import Box, Tile, Tiling
from harness.ranks import RankContext

Retile = Callable[[Tiling, ModelSpec, int | None], Tiling]
"""(tiling, spec, layer_idx) to another tiling of the same shape."""


@contextlib.contextmanager
def _nothing_remembered() -> Iterator[None]:
    """The tables of resolved parameters are cached by model; a fault must not find the old ones."""
    cached = parameters._parameters  # noqa: SLF001 - the seam
    cached.cache_clear()
    try:
        yield
    finally:
        cached.cache_clear()


@dataclass(frozen=True, slots=True)
class Retiled:
    """Parameters whose names end so have other tiles. Enter to apply."""

    suffixes: tuple[str, ...]
    change: Retile

    def __call__(self) -> contextlib.AbstractContextManager[None]:
        """The changed bridge."""
        return self._applied()

    @contextlib.contextmanager
    def _applied(self) -> Iterator[None]:
        healthy = parameters._resolve  # noqa: SLF001 - the seam

        def resolve(row: Any, spec: ModelSpec, padded: int, layer_idx: int | None = None) -> Any:  # noqa: ANN401 - a Row
            found: Parameter = healthy(row, spec, padded, layer_idx)
            if not found.name.endswith(self.suffixes):
                return found
            changed = self.change(found.tiling, spec, layer_idx)
            return dataclasses.replace(found, tiling=changed)

        with _nothing_remembered(), mock.patch.object(parameters, "_resolve", resolve):
            yield


@dataclass(frozen=True, slots=True)
class Reshaped:
    """Parameters whose names end so are changed in other ways than their tiles."""

    suffixes: tuple[str, ...]
    change: Callable[[Parameter, ModelSpec], Parameter | None]
    """None leaves the parameter out."""

    def __call__(self) -> contextlib.AbstractContextManager[None]:
        """The changed bridge."""
        return self._applied()

    @contextlib.contextmanager
    def _applied(self) -> Iterator[None]:
        healthy = parameters._parameters  # noqa: SLF001 - the seam

        def table(spec: ModelSpec, padded: int) -> dict[str, Parameter]:
            found = {}
            for name, one in healthy(spec, padded).items():
                changed = self.change(one, spec) if name.endswith(self.suffixes) else one
                if changed is not None:
                    found[name] = changed
            return found

        table.cache_clear = lambda: None  # type: ignore[attr-defined]  # what a nested fault calls
        with _nothing_remembered(), mock.patch.object(parameters, "_parameters", table):
            yield


@dataclass(frozen=True, slots=True)
class Replaced:
    """A function or attribute of a module is another one, made from the healthy one.

    Args:
        module: Dotted name; imported when the fault is entered.
        attribute: Dotted name inside the module.
        change: Healthy value to faulty one.
    """

    module: str
    attribute: str
    change: Callable[[Any], Any]

    def __call__(self, *_: object) -> contextlib.AbstractContextManager[None]:
        """The changed code; serves as the seam of this process and, with a context, of a rank."""
        return self._applied()

    @contextlib.contextmanager
    def _applied(self) -> Iterator[None]:
        owner: Any = importlib.import_module(self.module)
        *path, name = self.attribute.split(".")
        for part in path:
            owner = getattr(owner, part)
        # Not getattr: a staticmethod must stay one.
        stored = owner.__dict__[name] if name in owner.__dict__ else getattr(owner, name)
        is_static = isinstance(stored, staticmethod)
        changed = self.change(stored.__func__ if is_static else stored)
        with (
            _nothing_remembered(),
            mock.patch.object(owner, name, staticmethod(changed) if is_static else changed),
        ):
            yield


@dataclass(frozen=True, slots=True)
class Together:
    """Several seams at once."""

    parts: tuple[Callable[..., contextlib.AbstractContextManager[None]], ...]

    def __call__(self, *arguments: object) -> contextlib.AbstractContextManager[None]:
        """All of them entered."""
        return self._applied(*arguments)

    @contextlib.contextmanager
    def _applied(self, *arguments: object) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part(*arguments))
            yield


@dataclass(frozen=True, slots=True)
class AfterBuild:
    """`change(part, spec, context)` on every model part that a rank builds."""

    change: Callable[[Any, ModelSpec, RankContext], None]

    def __call__(self, context: RankContext) -> contextlib.AbstractContextManager[None]:
        """A rank whose models are built otherwise."""
        return Replaced("bridge.model", "build_model", partial(self._wrap, context))()

    def _wrap(self, context: RankContext, healthy: Any) -> Any:  # noqa: ANN401 - a function
        def build(spec: ModelSpec, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the function's own
            parts = healthy(spec, *args, **kwargs)
            for part in parts:
                self.change(part, spec, context)
            return parts

        return build


@dataclass(frozen=True, slots=True)
class AfterLoad:
    """`change(part, spec, context)` on every model part that a rank has filled."""

    change: Callable[[Any, ModelSpec, RankContext], None]

    def __call__(self, context: RankContext) -> contextlib.AbstractContextManager[None]:
        """A rank whose weights are others than it was given."""
        wrap = partial(self._wrap, context)
        return Together(
            (
                Replaced("bridge.live_parameters", "load_hf", wrap),
                Replaced("bridge.live_parameters", "load_megatron", wrap),
            )
        )()

    def _wrap(self, context: RankContext, healthy: Any) -> Any:  # noqa: ANN401 - a function
        def load(parts: Any, spec: ModelSpec, *args: Any) -> None:  # noqa: ANN401 - the function's own
            import torch

            healthy(parts, spec, *args)
            with torch.no_grad():
                for part in parts:
                    self.change(part, spec, context)

        return load


def permute_rows(tiling: Tiling, order: Sequence[int]) -> Tiling:
    """Rows of a parameter in another order: new row i is what row `order[i]` was."""
    return _permute(tiling, order, axis=0)


def permute_columns(tiling: Tiling, order: Sequence[int]) -> Tiling:
    """Columns of a parameter in another order."""
    return _permute(tiling, order, axis=1)


def _permute(tiling: Tiling, order: Sequence[int], *, axis: int) -> Tiling:
    """By runs: neighbours that stay neighbours stay in one tile."""
    tiles: list[Tile] = []
    breaks = np.flatnonzero(np.diff(np.asarray(order)) != 1) + 1
    position = 0
    for run in np.split(np.asarray(order), breaks):
        first, last = int(run[0]), int(run[-1]) + 1
        starts, stops = [0] * len(tiling.shape), list(tiling.shape)
        starts[axis], stops[axis] = first, last
        place = [0] * len(tiling.shape)
        place[axis] = position
        part = tiling.restrict([Box(tuple(starts), tuple(stops))], axis=axis)
        tiles += [
            Tile(tile.source, tile.source_box, tile.target_box.shift(place)) for tile in part.tiles
        ]
        position += last - first
    return Tiling(tiling.shape, tuple(tiles))


def rename_sources(tiling: Tiling, names: dict[str, str]) -> Tiling:
    """The same rectangles of other tensors."""

    def renamed(tile: Tile) -> Tile:
        if tile.source not in names:
            return tile
        return Tile(names[tile.source], tile.source_box, tile.target_box)

    return Tiling(tiling.shape, tuple(map(renamed, tiling.tiles)))
