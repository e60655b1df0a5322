"""The truth: a float64 forward pass of the whole architecture, in NumPy, in one file.

Written from the published description of Llama 3 and DeciLM, to be read top to bottom: reading a
`config.json`, rotary angles, the sub-blocks, the model. It shares no code with the bridge, with
torch models or with Megatron; an import contract holds it to NumPy and the standard library.

Everything is float64 but the rotary angles: every implementation of these models computes
`position * inv_freq` in float32, so the angle rounded to float32 *is* the definition. Its cosine
and sine are float64 again.

Weights come by their Hugging Face names, through a callable. What it returns is sliced by rows, a
few MiB at a time, so a lazy reader of a 14 GB tensor does as well as an array.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import numpy as np

Config = Mapping[str, Any]
Array = np.ndarray[Any, np.dtype[np.float64]]
Float32s = np.ndarray[Any, np.dtype[np.float32]]
Integers = np.ndarray[Any, np.dtype[np.integer[Any]]]


class Rows(Protocol):
    """What a weight must offer: a shape and slices of rows, of floating-point numbers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        ...

    def __getitem__(self, rows: slice, /) -> np.ndarray[Any, np.dtype[np.floating[Any]]]:
        """Rows, as any floating dtype that holds the values exactly."""
        ...


Weight = Callable[[str], Rows]
Capture = Callable[[int, Array], None]
_Place = TypeVar("_Place")

_ELEMENTS_AT_ONCE: Final = 1 << 20
"""Rows of a matrix are converted to float64 in pieces of at most 8 MiB, which caches hold."""

_TOKENS_AT_ONCE: Final = 512
"""Scores of attention are computed in squares of so many queries and keys, 2 MiB a sequence."""

_threads: ContextVar[ThreadPoolExecutor | None] = ContextVar("threads", default=None)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let so many threads share the rows of each matrix and the heads of each attention.

    Each row's sums are the same however many they are. Let BLAS run one thread then: its threads
    wait for each other.
    """
    with ThreadPoolExecutor(count, thread_name_prefix="oracle") as pool:
        before = _threads.set(pool)
        try:
            yield
        finally:
            _threads.reset(before)


def _each(work: Callable[[_Place], None], places: Iterable[_Place]) -> None:
    pool = _threads.get()
    for _ in (map if pool is None else pool.map)(work, places):
        pass


# --------------------------------------------------------------------------------------
# Reading config.json
# --------------------------------------------------------------------------------------


class NotUnderstoodError(ValueError):
    """The configuration asks for something this description of the architecture lacks."""


@dataclass(frozen=True, slots=True)
class Absent:
    """A no-op sub-block."""


@dataclass(frozen=True, slots=True)
class Replaced:
    """A sub-block replaced by one square matrix."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Causal attention with this many key and value heads."""

    num_query_groups: int


@dataclass(frozen=True, slots=True)
class Mlp:
    """A gated feed-forward of this width."""

    ffn_hidden_size: int


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding; `llama3` is (factor, low_freq_factor, high_freq_factor, old length)."""

    base: float
    llama3: tuple[float, float, float, int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """All that the forward pass needs to know.

    `float32_powers` are the base's powers as the models' own library computes them in float32;
    None computes them here. See `inverse_frequencies`.
    """

    hidden_size: int
    num_attention_heads: int
    kv_channels: int
    vocab_size: int
    layernorm_epsilon: float
    tied: bool
    rope: Rope
    float32_powers: tuple[float, ...] | None = None
    blocks: tuple[tuple[Attention | Replaced | Absent, Mlp | Replaced | Absent], ...]


POWERS: Final = "oracle.float32_powers"
"""A key that a caller may add to a configuration: `Architecture.float32_powers`."""


def read_config(config: Config) -> Architecture:
    """Read a Hugging Face configuration, Llama or DeciLM, either block schema, either RoPE style.

    Raises:
        NotUnderstoodError: A field asks for something that the forward pass below does not do.
    """
    for field, plain in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("partial_rotary_factor", 1.0),
    ):
        if config.get(field, plain) not in (plain, None):
            raise NotUnderstoodError(f"{field}={config[field]!r}")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    blocks: list[tuple[Attention | Replaced | Absent, Mlp | Replaced | Absent]] = []
    if config.get("block_configs") is None:
        groups = config.get("num_key_value_heads") or heads
        block = (Attention(groups), Mlp(config["intermediate_size"]))
        blocks = [block] * config["num_hidden_layers"]
    else:
        if len(config["block_configs"]) != config["num_hidden_layers"]:
            raise NotUnderstoodError("block_configs and num_hidden_layers disagree")
        for entry in config["block_configs"]:
            if entry.get("parallel_blocks"):
                raise NotUnderstoodError("parallel_blocks")
            blocks.append((_read_attention(entry["attention"], heads), _read_ffn(entry, hidden)))
    return Architecture(
        hidden_size=hidden,
        num_attention_heads=heads,
        kv_channels=config.get("head_dim") or hidden // heads,
        vocab_size=config["vocab_size"],
        layernorm_epsilon=config["rms_norm_eps"],
        tied=config.get("tie_word_embeddings", False),
        rope=_read_rope(config),
        float32_powers=config.get(POWERS),
        blocks=tuple(blocks),
    )


def _read_attention(entry: Config, heads: int) -> Attention | Replaced | Absent:
    replaced = _read_replacement(entry)
    if replaced is not None:
        return replaced
    for field in ("window_length", "num_sink_tokens", "sparsify", "mamba", "llama4"):
        if entry.get(field):
            raise NotUnderstoodError(f"attention.{field}={entry[field]!r}")
    if entry.get("num_key_value_heads") is not None:
        return Attention(entry["num_key_value_heads"])
    return Attention(heads // entry["n_heads_in_group"])


def _read_ffn(block: Config, hidden: int) -> Mlp | Replaced | Absent:
    entry = block["ffn"]
    replaced = _read_replacement(entry)
    if replaced is not None:
        return replaced
    for field in ("sparsify", "moe"):
        if entry.get(field):
            raise NotUnderstoodError(f"ffn.{field}={entry[field]!r}")
    if entry.get("gated", True) is False or (entry.get("hidden_act") or "silu") != "silu":
        raise NotUnderstoodError("an ffn that is not a SwiGLU")
    if entry.get("intermediate_size") is not None:
        return Mlp(entry["intermediate_size"])
    width = int(2 * round(entry["ffn_mult"], 6) * hidden / 3)
    return Mlp(-(-width // 256) * 256)


def _read_replacement(entry: Config) -> Replaced | Absent | None:
    if entry.get("no_op") and entry.get("replace_with_linear"):
        raise NotUnderstoodError("a sub-block that is both a no-op and a linear replacement")
    if entry.get("no_op"):
        return Absent()
    return Replaced() if entry.get("replace_with_linear") else None


def _read_rope(config: Config) -> Rope:
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    match scaling.get("rope_type", scaling.get("type", "default")):
        case "default":
            return Rope(base, None)
        case "llama3":
            fields = ("factor", "low_freq_factor", "high_freq_factor")
            factor, low, high = (scaling[field] for field in fields)
            return Rope(base, (factor, low, high, scaling["original_max_position_embeddings"]))
        case other:
            raise NotUnderstoodError(f"rope_type={other!r}")


# --------------------------------------------------------------------------------------
# Rotary position embedding
# --------------------------------------------------------------------------------------


def inverse_frequencies(model: Architecture) -> Float32s:
    """The rotation per position of each pair of channels, (kv_channels / 2,), float32.

    Each step is rounded to float32 in the order of the published definition, where dividing a
    number by a tensor is multiplying it by the reciprocal. The power alone is computed in float64
    and rounded once, since float32 power functions differ between libraries by an ulp. torch's is
    equal to this for multiples of 4 below 72 and for 128 at theta 500000; at 72, 76, 92, 96, 104
    and some larger ones it is an ulp off at one frequency or more. Which of the two a model means
    only its library knows, so a caller may give that library's powers.
    """
    one = np.float32(1)
    exponent = np.arange(0, model.kv_channels, 2, dtype=np.float32) / np.float32(model.kv_channels)
    if model.float32_powers is None:
        power = np.float64(np.float32(model.rope.base)) ** exponent.astype(np.float64)
    else:
        power = np.array(model.float32_powers, np.float64)
    plain: Float32s = one / power.astype(np.float32)
    if model.rope.llama3 is None:
        return plain
    factor, low, high, old_length = model.rope.llama3
    wavelength = (one / plain) * np.float32(2 * np.pi)
    is_long = wavelength > np.float32(old_length / low)
    is_short = wavelength < np.float32(old_length / high)
    slowed = np.where(is_long, plain / np.float32(factor), plain)
    smooth = (one / wavelength) * np.float32(old_length)
    smooth = (smooth - np.float32(low)) / np.float32(high - low)
    blend = (one - smooth) * slowed / np.float32(factor) + smooth * slowed
    return np.where(is_short | is_long, slowed, blend)


def rotary_angles(model: Architecture, position_ids: Integers) -> Array:
    """Angles in radians, (..., seq, kv_channels / 2): float32 products, held as float64."""
    positions = position_ids.astype(np.float32)[..., None]
    return (positions * inverse_frequencies(model)).astype(np.float64)


def rotate(x: Array, angles: Array) -> Array:
    """Turn channel i of each head with its partner, channel i + kv_channels / 2.

    Args:
        x: (batch, heads, seq, kv_channels).
        angles: (batch or 1, 1, seq, kv_channels / 2), radians.
    """
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


# --------------------------------------------------------------------------------------
# Sub-blocks
# --------------------------------------------------------------------------------------


def linear(x: Array, weight: Weight, name: str, shape: tuple[int, int]) -> Array:
    """`x @ W.T` for the named W of this shape, a few rows of W at a time."""
    matrix = _of_shape(weight, name, shape)
    out = np.empty((*x.shape[:-1], shape[0]))
    step = max(1, _ELEMENTS_AT_ONCE // shape[1])

    def some(start: int) -> None:
        out[..., start : start + step] = x @ _float64(matrix[start : start + step], name).T

    _each(some, range(0, shape[0], step))
    return out


def rms_norm(x: Array, weight: Weight, name: str, epsilon: float) -> Array:
    """Scale each vector to root mean square one, then channel by channel."""
    scale = _float64(_of_shape(weight, name, x.shape[-1:])[:], name)
    unit: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon)
    return unit * scale


def attention(
    x: Array, angles: Array, weight: Weight, *, prefix: str, model: Architecture, groups: int
) -> Array:
    """Causal attention; `num_attention_heads // groups` query heads share a key and value head.

    Long sequences are cut into bands of queries; the sums are the same however many there are.

    Args:
        x: (batch, seq, hidden_size), normed.
        angles: (batch or 1, seq, kv_channels / 2), radians.
        weight: Weights by name.
        prefix: `model.layers.3.self_attn`.
        model: Dimensions.
        groups: `num_query_groups` of this block.
    """
    batch, seq, hidden = x.shape
    heads, channels = model.num_attention_heads, model.kv_channels

    def project(name: str, count: int) -> Array:
        rows = linear(x, weight, f"{prefix}.{name}.weight", (count * channels, hidden))
        return rows.reshape(batch, seq, count, channels).swapaxes(1, 2)

    query = rotate(project("q_proj", heads), angles[:, None])
    key = rotate(project("k_proj", groups), angles[:, None])
    value = project("v_proj", groups)
    mixed = np.empty_like(query)

    def mix(place: tuple[int, int]) -> None:
        first, head = place
        last, group = min(first + _TOKENS_AT_ONCE, seq), head // (heads // groups)
        mixed[:, head, first:last] = _attend(
            query[:, head, first:last], key[:, group, :last], value[:, group, :last]
        )

    bands = range(0, seq, _TOKENS_AT_ONCE)
    # The last bands take longest: they start first.
    _each(mix, itertools.product(reversed(bands), range(heads)))
    joined = mixed.swapaxes(1, 2).reshape(batch, seq, heads * channels)
    return linear(joined, weight, f"{prefix}.o_proj.weight", (hidden, heads * channels))


def _attend(query: Array, key: Array, value: Array) -> Array:
    """What one head makes of a band of queries, the last of which sees all the keys.

    The softmax is summed over a few keys at a time. Whenever they hold a larger score than those
    before, what has been summed is scaled down to it.

    Args:
        query: (batch, band, kv_channels).
        key: (batch, keys, kv_channels): all up to the last query's own.
        value: Same shape.
    """
    batch, band, channels = query.shape
    keys = key.shape[1]
    largest = np.full((batch, band, 1), -np.inf)
    total, mixed = np.zeros((batch, band, 1)), np.zeros(query.shape)
    for start in range(0, keys, _TOKENS_AT_ONCE):
        some = slice(start, start + _TOKENS_AT_ONCE)
        scores = query @ key[:, some].swapaxes(1, 2)
        scores /= np.sqrt(channels)
        own = keys - band - start  # column of the first query's own key
        if own < scores.shape[-1]:
            scores[:, np.triu(np.ones(scores.shape[1:], dtype=bool), k=own + 1)] = -np.inf
        larger = np.maximum(largest, scores.max(axis=-1, keepdims=True))
        scores -= larger
        np.exp(scores, out=scores)
        scale = np.exp(largest - larger)
        total = total * scale + scores.sum(axis=-1, keepdims=True)
        mixed = mixed * scale + scores @ value[:, some]
        largest = larger
    quotient: Array = mixed / total
    return quotient


def mlp(x: Array, weight: Weight, prefix: str, width: int) -> Array:
    """`down(silu(gate(x)) * up(x))`."""
    hidden = x.shape[-1]
    gate = linear(x, weight, f"{prefix}.gate_proj.weight", (width, hidden))
    up = linear(x, weight, f"{prefix}.up_proj.weight", (width, hidden))
    with np.errstate(over="ignore"):  # exp(710) is inf, and the quotient the right zero
        silu = gate / (1 + np.exp(-gate))
    return linear(silu * up, weight, f"{prefix}.down_proj.weight", (hidden, width))


# --------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------


def block(
    hidden: Array, angles: Array, weight: Weight, model: Architecture, layer_idx: int
) -> Array:
    """One transformer block: each sub-block that is there adds to the residual stream.

    Args:
        hidden: (batch, seq, hidden_size).
        angles: (batch or 1, seq, kv_channels / 2), from `rotary_angles`.
        weight: Weights by name.
        model: Dimensions and kinds.
        layer_idx: Which block.
    """
    prefix, square = f"model.layers.{layer_idx}", (model.hidden_size, model.hidden_size)
    first, second = model.blocks[layer_idx]
    if not isinstance(first, Absent):
        name = f"{prefix}.input_layernorm.weight"
        normed = rms_norm(hidden, weight, name, model.layernorm_epsilon)
        if isinstance(first, Replaced):
            name = f"{prefix}.self_attn.linear_attn.weight"
            hidden = hidden + linear(normed, weight, name, square)
        else:
            part, groups = f"{prefix}.self_attn", first.num_query_groups
            hidden = hidden + attention(
                normed, angles, weight, prefix=part, model=model, groups=groups
            )
    if not isinstance(second, Absent):
        name = f"{prefix}.post_attention_layernorm.weight"
        normed = rms_norm(hidden, weight, name, model.layernorm_epsilon)
        if isinstance(second, Replaced):
            name = f"{prefix}.mlp.linear_mlp.weight"
            hidden = hidden + linear(normed, weight, name, square)
        else:
            hidden = hidden + mlp(normed, weight, f"{prefix}.mlp", second.ffn_hidden_size)
    return hidden


def embed(weight: Weight, model: Architecture, input_ids: Integers) -> Array:
    """Rows of the embedding, (batch, seq, hidden_size); each distinct row is read once."""
    if input_ids.size and not 0 <= input_ids.min() <= input_ids.max() < model.vocab_size:
        raise ValueError(f"input_ids leave the vocabulary of {model.vocab_size}")
    name = "model.embed_tokens.weight"
    table = _of_shape(weight, name, (model.vocab_size, model.hidden_size))
    tokens, inverse = np.unique(input_ids, return_inverse=True)
    rows = [_float64(table[token : token + 1], name)[0] for token in tokens.tolist()]
    return np.stack(rows)[inverse.reshape(input_ids.shape)]


def head(hidden: Array, weight: Weight, model: Architecture) -> Array:
    """The final norm and the output layer: logits, (batch, seq, vocab_size)."""
    normed = rms_norm(hidden, weight, "model.norm.weight", model.layernorm_epsilon)
    name = "model.embed_tokens.weight" if model.tied else "lm_head.weight"
    return linear(normed, weight, name, (model.vocab_size, model.hidden_size))


def forward(
    config: Config,
    weight: Weight,
    input_ids: Integers,
    position_ids: Integers,
    *,
    capture: Capture | None = None,
) -> Array:
    """Logits of the model, exact but for float64 rounding.

    Args:
        config: The parsed `config.json`.
        weight: Gives any weight by its Hugging Face name. Called when the weight is needed.
        input_ids: (batch, seq), integers.
        position_ids: (seq,) or (batch, seq), integers. Attention is causal in sequence order,
            whatever the positions.
        capture: Called with (layer_idx, hidden state after that block); -1 is the embedding.

    Returns:
        (batch, seq, vocab_size), float64.

    Raises:
        NotUnderstoodError: The configuration asks for what is not described here.
        ValueError: Ids, positions or a weight have the wrong shape, dtype or range.
    """
    model = read_config(config)
    if input_ids.ndim != 2 or not input_ids.size:
        raise ValueError(f"input_ids must be (batch, seq) and not empty, got {input_ids.shape}")
    if position_ids.shape not in (input_ids.shape, input_ids.shape[1:]):
        raise ValueError(f"position_ids {position_ids.shape} do not fit {input_ids.shape}")
    angles = rotary_angles(model, position_ids.reshape(-1, input_ids.shape[1]))
    hidden = embed(weight, model, input_ids)
    if capture is not None:
        capture(-1, hidden)
    for layer_idx in range(len(model.blocks)):
        hidden = block(hidden, angles, weight, model, layer_idx)
        if capture is not None:
            capture(layer_idx, hidden)
    return head(hidden, weight, model)


def _of_shape(weight: Weight, name: str, shape: tuple[int, ...]) -> Rows:
    found = weight(name)
    if tuple(found.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(found.shape)}, the model needs {tuple(shape)}")
    return found


def _float64(values: np.ndarray[Any, np.dtype[np.floating[Any]]], name: str) -> Array:
    if values.dtype.kind != "f":  # bit patterns of bfloat16 would otherwise pass as numbers
        raise ValueError(f"{name} is {values.dtype}, not floating point")
    return values.astype(np.float64, copy=False)
