"""The toys: one for each published variant, two for features that none has, one for long runs."""

from __future__ import annotations

from typing import Final

from bridge.errors import ConfigError
from harness.oracle import (
    Absent,
    Architecture,
    Attention,
    Mlp,
    Replaced,
    inverse_frequencies,
)
from harness.toys.configs import (
    LINEAR,
    Part,
    published_config,
    puzzle_blocks,
    released_blocks,
    shrink,
)
from harness.toys.model import Toy
from harness.toys.properties import Property, groups_of, longest_run, widths_of

_GROUPS_BELOW_TP: Final[Property] = (
    "num_query_groups is 2: below TP=4",
    lambda m: set(groups_of(m)) == {2},
)


def _rope_factor(factor: float) -> Property:
    return (
        f"RoPE factor {factor:g}",
        lambda m: m.rope.llama3 is not None and m.rope.llama3[0] == factor,
    )


def _queries_per_group(count: int) -> Property:
    return (
        f"{count} query heads share a key head",
        lambda m: {m.num_attention_heads // groups for groups in groups_of(m)} == {count},
    )


def _has_block(model: Architecture, attention: type, ffn: type) -> bool:
    return any(isinstance(a, attention) and isinstance(f, ffn) for a, f in model.blocks)


def _nano_4b() -> Toy:
    real = published_config("Llama-3.1-Nemotron-Nano-4B-v1.1")
    return Toy(
        name="nano-4b",
        stands_for="Llama-3.1-Nemotron-Nano-4B-v1.1: heads x head_dim is not hidden_size",
        config=shrink(
            real, hidden_size=96, num_attention_heads=8, num_key_value_heads=2, head_dim=16,
            intermediate_size=288, num_hidden_layers=6, vocab_size=515,
        ),
        properties=(
            (
                "heads x head_dim is not hidden_size",
                lambda m: m.num_attention_heads * m.kv_channels != m.hidden_size,
            ),
            _GROUPS_BELOW_TP,
            _queries_per_group(4),
            _rope_factor(8),
        ),
    )  # fmt: skip


def _nano_8b() -> Toy:
    real = published_config("Llama-3.1-Nemotron-Nano-8B-v1")
    return Toy(
        name="nano-8b",
        stands_for="Llama-3.1-Nemotron-Nano-8B-v1: plain Llama 3.1",
        config=shrink(
            real, hidden_size=192, num_attention_heads=8, num_key_value_heads=2, head_dim=24,
            intermediate_size=672, num_hidden_layers=6, vocab_size=517,
        ),
        properties=(
            (
                "heads x head_dim is hidden_size",
                lambda m: m.num_attention_heads * m.kv_channels == m.hidden_size,
            ),
            _GROUPS_BELOW_TP,
            _queries_per_group(4),
            _rope_factor(8),
        ),
    )  # fmt: skip


def _llama_70b() -> Toy:
    real = published_config("Llama-3.1-Nemotron-70B-Instruct-HF")
    return Toy(
        name="70b",
        stands_for="Llama-3.1-Nemotron-70B-Instruct-HF: 8 query heads a group, more layers",
        config=shrink(
            real, hidden_size=128, num_attention_heads=16, num_key_value_heads=2, head_dim=8,
            intermediate_size=448, num_hidden_layers=8, vocab_size=519,
        ),
        properties=(_GROUPS_BELOW_TP, _queries_per_group(8), _rope_factor(8)),
    )  # fmt: skip


def _stand_in_51b() -> Toy:
    real = published_config("Llama-3_3-Nemotron-Super-49B-v1")
    parts: list[tuple[Part, Part]] = [
        (3, 5.25), (LINEAR, 2.625), (6, LINEAR), (LINEAR, LINEAR),
        (12, 11.5), (6, None), (LINEAR, None), (None, LINEAR),
    ]  # fmt: skip
    return Toy(
        name="51b",
        stands_for="a synthetic stand-in for Llama-3_1-Nemotron-51B-Instruct, whose block list is "
        "not at hand: linear replacements, mixed group counts and widths",
        config=shrink(
            real, _name_or_path="synthetic_stand_in_51b", hidden_size=96, num_attention_heads=12,
            num_hidden_layers=8, vocab_size=521, block_configs=released_blocks(real, parts),
        ),
        properties=(
            ("both sub-blocks linear in one block", lambda m: _has_block(m, Replaced, Replaced)),
            ("linear attention with a SwiGLU", lambda m: _has_block(m, Replaced, Mlp)),
            ("linear attention without an FFN", lambda m: _has_block(m, Replaced, Absent)),
            ("attention with a linear FFN", lambda m: _has_block(m, Attention, Replaced)),
            ("attention without an FFN", lambda m: _has_block(m, Attention, Absent)),
            ("a linear FFN without attention", lambda m: _has_block(m, Absent, Replaced)),
            ("n_heads_in_group takes three values", lambda m: len(set(groups_of(m))) == 3),
            (
                "one block has a single group, another a group for each TP rank of 4",
                lambda m: {1, 4} <= set(groups_of(m)),
            ),
            ("three FFN widths", lambda m: len(set(widths_of(m))) == 3),
            _rope_factor(8),
        ),
    )  # fmt: skip


def _super_49b(name: str, variant: str, factor: float) -> Toy:
    real = published_config(variant)
    parts: list[tuple[Part, Part]] = [
        (8, 5.25), (8, 13.125), (None, 2.625), (8, 8.4),
        (None, 5.25), (None, 0.5), (8, 2.625), (8, 5.25),
    ]  # fmt: skip
    return Toy(
        name=name,
        stands_for=f"{variant}: attention no-ops, several FFN widths, RoPE factor {factor:g}",
        config=shrink(
            real, hidden_size=128, num_attention_heads=16, num_hidden_layers=8, vocab_size=523,
            block_configs=released_blocks(real, parts),
        ),
        properties=(
            (
                "at least two attention no-ops",
                lambda m: sum(isinstance(a, Absent) for a, _ in m.blocks) >= 2,
            ),
            ("no FFN no-op", lambda m: all(isinstance(f, Mlp) for _, f in m.blocks)),
            ("four FFN widths", lambda m: len(set(widths_of(m))) == 4),
            ("block 0 has attention", lambda m: isinstance(m.blocks[0][0], Attention)),
            _GROUPS_BELOW_TP,
            _queries_per_group(8),
            _rope_factor(factor),
        ),
    )  # fmt: skip


def _ultra_253b() -> Toy:
    real = published_config("Llama-3_1-Nemotron-Ultra-253B-v1")
    parts: list[tuple[Part, Part]] = [
        (None, 1.95), (16, 4.875), (None, None), (None, None),
        (None, 39.0), (None, None), (16, 3.4125), (16, 2.4375),
    ]  # fmt: skip
    return Toy(
        name="ultra-253b",
        stands_for="Llama-3_1-Nemotron-Ultra-253B-v1: blocks with nothing in them, one very wide "
        "FFN, a stretch without attention",
        config=shrink(
            real, hidden_size=256, num_attention_heads=32, num_hidden_layers=8, vocab_size=525,
            block_configs=released_blocks(real, parts),
        ),
        properties=(
            ("block 0 has no attention", lambda m: isinstance(m.blocks[0][0], Absent)),
            (
                "an FFN no-op always comes with an attention no-op",
                lambda m: all(isinstance(a, Absent) for a, f in m.blocks if isinstance(f, Absent)),
            ),
            (
                "two neighbouring blocks hold nothing: a whole stage of VPP=2 over PP=2",
                lambda m: m.blocks[2:4] == ((Absent(), Absent()),) * 2,
            ),
            (
                "at least four blocks in a row have no attention",
                lambda m: longest_run([isinstance(a, Absent) for a, _ in m.blocks]) >= 4,
            ),
            (
                "the widest FFN is 26 times hidden_size, the next under 5 times",
                lambda m: (
                    max(widths_of(m)) == 26 * m.hidden_size
                    and sorted(widths_of(m))[-2] < 5 * m.hidden_size
                ),
            ),
            _GROUPS_BELOW_TP,
            _queries_per_group(16),
            _rope_factor(16),
        ),
    )  # fmt: skip


def _tied() -> Toy:
    real = published_config("Llama-3.1-Nemotron-Nano-4B-v1.1")
    theta, scaling = real.pop("rope_theta"), real.pop("rope_scaling")
    real["dtype"] = real.pop("torch_dtype")
    real["rope_parameters"] = scaling | {"rope_theta": theta, "factor": 32.0}
    return Toy(
        name="tied",
        stands_for="tied embeddings, saved by transformers 5 (`rope_parameters`, `dtype`)",
        config=shrink(
            real, tie_word_embeddings=True, hidden_size=96, num_attention_heads=12,
            num_key_value_heads=4, head_dim=16, intermediate_size=320, num_hidden_layers=6,
            transformers_version="5.0.0", vocab_size=527,
        ),
        properties=(
            ("tied embeddings", lambda m: m.tied),
            _queries_per_group(3),
            _rope_factor(32),
        ),
    )  # fmt: skip


def _puzzle() -> Toy:
    real = published_config("Llama-3_3-Nemotron-Super-49B-v1_5")
    parts: list[tuple[Part, Part]] = [
        (2, 516), (4, 300), (None, 644), (1, LINEAR), (LINEAR, 516), (None, None), (4, 644),
    ]  # fmt: skip
    return Toy(
        name="puzzle",
        stands_for="the newer block schema (`num_key_value_heads`, `intermediate_size`)",
        config=shrink(
            real, hidden_size=160, num_attention_heads=20, num_hidden_layers=7, vocab_size=529,
            block_configs=puzzle_blocks(parts),
        ),
        properties=(
            (
                "widths that `ffn_mult` cannot say",
                lambda m: all(width % 256 for width in widths_of(m)),
            ),
            ("three group counts", lambda m: len(set(groups_of(m))) == 3),
            ("a single query group in a block", lambda m: 1 in groups_of(m)),
            ("an odd number of layers: every PP=2 is uneven", lambda m: len(m.blocks) % 2 == 1),
            _rope_factor(16),
        ),
    )  # fmt: skip


def _context() -> Toy:
    real = published_config("Llama-3_3-Nemotron-Super-49B-v1_5")
    parts: list[tuple[Part, Part]] = [
        (2, 3.0), (None, 3.0), (2, 4.5), (None, None), (None, 3.0), (None, None),
    ]  # fmt: skip
    return Toy(
        name="context",
        stands_for="sequences as long as the context: heads of a size that fused attention is "
        "made for, and few enough of them for a float64 pass over 131,072 tokens",
        config=shrink(
            real, hidden_size=256, num_attention_heads=4, num_hidden_layers=6, vocab_size=531,
            block_configs=released_blocks(real, parts),
        ),
        properties=(
            ("head_dim is 64", lambda m: m.kv_channels == 64),
            (
                "two blocks have attention, so keys and values of the second are of mixed tokens",
                lambda m: len(groups_of(m)) == 2,
            ),
            ("a block between them has none", lambda m: isinstance(m.blocks[1][0], Absent)),
            (
                "the slowest pair of channels turns by less than 1 rad in 131,072 positions",
                lambda m: 131_071 * float(inverse_frequencies(m).min()) < 1,
            ),
            _GROUPS_BELOW_TP,
            _queries_per_group(2),
            _rope_factor(16),
        ),
    )  # fmt: skip


def _all() -> dict[str, Toy]:
    toys = (
        _nano_4b(),
        _nano_8b(),
        _llama_70b(),
        _stand_in_51b(),
        _super_49b("super-49b-v1", "Llama-3_3-Nemotron-Super-49B-v1", 8),
        _super_49b("super-49b-v1_5", "Llama-3_3-Nemotron-Super-49B-v1_5", 16),
        _ultra_253b(),
        _tied(),
        _puzzle(),
    )
    return {toy.name: toy for toy in toys}


TOYS: Final[dict[str, Toy]] = _all()
VARIANT_TOYS: Final = tuple(name for name in TOYS if name not in {"tied", "puzzle"})
"""The seven that stand for a published checkpoint."""
CONTEXT_TOY: Final = _context()
"""The one for the probes of a whole context; not among those that every check is run on."""


def toy_named(name: str) -> Toy:
    """Look a toy up; `toy:` before the name is allowed.

    Raises:
        ConfigError: BR100, no such toy.
    """
    known = {**TOYS, CONTEXT_TOY.name: CONTEXT_TOY}
    try:
        return known[name.removeprefix("toy:")]
    except KeyError:
        raise ConfigError(f"no toy is called {name!r}", hint=f"known: {', '.join(known)}") from None
