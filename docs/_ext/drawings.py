"""`{tiling}`: how a Megatron parameter is made of Hugging Face tensors, drawn from the table.

    ```{tiling} self_attention.linear_qkv.weight
    ```

The model drawn has 4 heads of 2 channels in 2 query groups, hidden size 12, FFN width 10 and 11
words in a vocabulary padded to 14, so that no two heights coincide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from docutils import nodes
from markupsafe import Markup
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from bridge.parameters import Parameter, hf_tensors, parameters
from bridge.spec import (
    BlockSpec,
    GroupedQueryAttention,
    ModelSpec,
    RopeSpec,
    SwiGLU,
)
from bridge.tiling import Box, Tile

_ROW, _BOX, _GAP, _TOP = 17, 190, 150, 34
_LEFT = 20
_RIGHT = _LEFT + _BOX + _GAP


def _model() -> ModelSpec:
    return ModelSpec(
        hidden_size=12,
        num_attention_heads=4,
        kv_channels=2,
        vocab_size=11,
        max_position_embeddings=64,
        layernorm_epsilon=1e-5,
        rope=RopeSpec(rotary_base=10000.0),
        blocks=(
            BlockSpec(
                attention=GroupedQueryAttention(num_query_groups=2),
                ffn=SwiGLU(ffn_hidden_size=10),
            ),
        ),
        share_embeddings_and_output_weights=False,
        params_dtype="bfloat16",
        heterogeneous_block_specs=False,
    )


def _height(box: Box) -> int:
    return box.shape[0] * _ROW


def _places(parameter: Parameter) -> dict[str, tuple[int, int]]:
    """Top and rows of each source tensor in the left column, one under the other."""
    shapes = hf_tensors(_model())
    found: dict[str, tuple[int, int]] = {}
    top = _TOP
    for tile in parameter.tiling.tiles:
        if tile.source is not None and tile.source not in found:
            rows = shapes[tile.source][0]
            found[tile.source] = (top, rows)
            top += rows * _ROW + 30
    return found


def _tile(tile: Tile, kind: int, top: int | None) -> Markup:
    """One tile on the right, its source on the left, and the band between them."""
    right, height = _TOP + tile.target_box.starts[0] * _ROW, _height(tile.target_box)
    parts = [
        Markup('<rect class="tile t{}" x="{}" y="{}" width="{}" height="{}"/>').format(
            kind, _RIGHT, right, _BOX, height
        )
    ]
    if top is None:
        label = "zeros"
    else:
        left = top + tile.source_box.starts[0] * _ROW
        parts += [
            Markup('<rect class="tile t{}" x="{}" y="{}" width="{}" height="{}"/>').format(
                kind, _LEFT, left, _BOX, height
            ),
            Markup('<path class="band t{}" d="M{} {} L{} {} L{} {} L{} {} Z"/>').format(
                kind, _LEFT + _BOX, left, _RIGHT, right,
                _RIGHT, right + height, _LEFT + _BOX, left + height,
            ),
        ]  # fmt: skip
        start, stop = tile.source_box.starts[0], tile.source_box.stops[0]
        label = f"{str(tile.source).rsplit('.', 2)[-2]} rows {start}-{stop - 1}"
    parts.append(
        Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
            _RIGHT + _BOX / 2, right + height / 2 + 4, label
        )
    )
    return Markup().join(parts)


def tiling_svg(name: str) -> Markup:
    """Draw one parameter: its sources on the left, itself on the right.

    Args:
        name: As in the table, relative to the layer for what belongs to a block.

    Raises:
        KeyError: No parameter is called so.
    """
    table = parameters(_model(), padded_vocab_size=14)
    parameter = table.get(name) or table[f"decoder.layers.0.{name}"]
    places = _places(parameter)
    kinds = {source: index for index, source in enumerate(places)}
    tiles = [
        _tile(
            tile,
            9 if tile.source is None else kinds[tile.source],
            None if tile.source is None else places[tile.source][0],
        )
        for tile in parameter.tiling.tiles
    ]
    heads = [
        Markup('<text class="head" x="{}" y="{}">{} {}</text>').format(
            _LEFT, top - 8, source.removeprefix("model.layers.0."), _shape((rows, _columns(source)))
        )
        for source, (top, rows) in places.items()
    ]
    heads.append(
        Markup('<text class="head" x="{}" y="{}">{} {}</text>').format(
            _RIGHT, _TOP - 8, name, _shape(parameter.shape)
        )
    )
    bottom = max(
        _TOP + parameter.shape[0] * _ROW, *(top + rows * _ROW for top, rows in places.values())
    )
    return Markup(
        '<svg class="drawing" role="img" aria-label="tiling of {}" viewBox="0 0 {} {}">{}{}</svg>'
    ).format(name, _RIGHT + _BOX + 110, bottom + 12, Markup().join(tiles), Markup().join(heads))


def _columns(source: str) -> int:
    return math.prod(hf_tensors(_model())[source][1:])


def _shape(shape: Sequence[int]) -> str:
    return "(" + ", ".join(str(size) for size in shape) + ")"


class Tiling(SphinxDirective):
    """Draws the tiling of the parameter it names."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Put the drawing into the page."""
        figure = f'<figure class="drawing">{tiling_svg(self.arguments[0])}</figure>'
        return [nodes.raw("", figure, format="html")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("tiling", Tiling)
    return {"parallel_read_safe": True}
