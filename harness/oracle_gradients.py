"""The truth about gradients: reverse mode through `harness.oracle`, by hand, in float64 NumPy.

Each function below is the transpose of the one in `harness.oracle` that it names. The forward pass
is the oracle's own and leaves the residual stream before every block; the inside of a block is
computed again when its turn comes, so nothing else is kept. The loss is the mean cross-entropy, in
nats per token, of each token given the ones before it in its sequence.

It holds every gradient in float64 at once: eight bytes per parameter of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness.oracle import (
    Absent,
    Architecture,
    Array,
    Attention,
    Config,
    Integers,
    Mlp,
    Replaced,
    Weight,
    attention,
    forward,
    linear,
    read_config,
    rms_norm,
    rotary_angles,
    rotate,
)

Gradients = dict[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossAndGradients:
    """What one backward pass gives.

    Attributes:
        loss: Mean cross-entropy, nats per token.
        gradients: Of the loss, by Hugging Face tensor name, each in its tensor's shape. Tied
            embeddings have one entry, the sum over both uses.
        logits_rms: Root mean square of the logits: what a rounding error of the loss is measured
            by, since a confident model's loss is much smaller than what it is the difference of.
    """

    loss: float
    gradients: Gradients
    logits_rms: float


def loss_and_gradients(
    config: Config, weight: Weight, input_ids: Integers, position_ids: Integers
) -> LossAndGradients:
    """Loss of a batch and its gradient with respect to every tensor of the model.

    Args:
        config: The parsed `config.json`.
        weight: Gives any weight by its Hugging Face name.
        input_ids: (batch, seq), integers; seq is at least 2, or there is nothing to predict.
        position_ids: (seq,) or (batch, seq), integers.

    Raises:
        NotUnderstoodError: As `harness.oracle.forward`.
        ValueError: As `harness.oracle.forward`, or sequences of one token.
    """
    if input_ids.ndim == 2 and input_ids.shape[1] < 2:
        raise ValueError("a sequence of one token has no next token to predict")
    stream: list[Array] = []  # after the embedding, then after each block
    logits = forward(
        config, weight, input_ids, position_ids, capture=lambda _, hidden: stream.append(hidden)
    )
    model = read_config(config)
    angles = rotary_angles(model, position_ids.reshape(-1, input_ids.shape[1]))
    loss, d_logits = _cross_entropy(logits, input_ids)
    found: Gradients = {}
    d_hidden = _head(stream[-1], d_logits, weight, model, found)
    for layer_idx in reversed(range(len(model.blocks))):
        d_hidden = _block(stream[layer_idx], d_hidden, angles, weight, model, layer_idx, found)
    _embed(input_ids, d_hidden, model, found)
    return LossAndGradients(
        loss=loss, gradients=found, logits_rms=float(np.sqrt(np.mean(logits * logits)))
    )


def _cross_entropy(logits: Array, input_ids: Integers) -> tuple[float, Array]:
    """The loss, and its gradient with respect to all logits: zero at each last position."""
    labels = input_ids[:, 1:, None]
    shifted = logits[:, :-1] - logits[:, :-1].max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    loss = float(np.mean(log_sum - np.take_along_axis(shifted, labels, axis=-1)))
    d_shifted = np.exp(shifted - log_sum)
    picked = np.take_along_axis(d_shifted, labels, axis=-1)
    np.put_along_axis(d_shifted, labels, picked - 1, axis=-1)
    gradient = np.zeros_like(logits)
    gradient[:, :-1] = d_shifted / labels.size
    return loss, gradient


def _head(
    hidden: Array, d_logits: Array, weight: Weight, model: Architecture, found: Gradients
) -> Array:
    """Through `oracle.head`; a tied table's second share is added by `_embed`."""
    norm = "model.norm.weight"
    normed = rms_norm(hidden, weight, norm, model.layernorm_epsilon)
    name = "model.embed_tokens.weight" if model.tied else "lm_head.weight"
    d_normed = _linear(normed, d_logits, weight, name, found)
    return _rms_norm(hidden, d_normed, weight, norm, model.layernorm_epsilon, found)


def _embed(input_ids: Integers, d_hidden: Array, model: Architecture, found: Gradients) -> None:
    """Through `oracle.embed`: each row gathers the gradients of all places it was used at."""
    table = found.setdefault(
        "model.embed_tokens.weight", np.zeros((model.vocab_size, model.hidden_size))
    )
    np.add.at(table, input_ids, d_hidden)


def _block(
    hidden: Array,
    d_out: Array,
    angles: Array,
    weight: Weight,
    model: Architecture,
    layer_idx: int,
    found: Gradients,
) -> Array:
    """Through `oracle.block`: what each sub-block passes back adds to the residual stream's."""
    prefix, epsilon = f"model.layers.{layer_idx}", model.layernorm_epsilon
    first, second = model.blocks[layer_idx]
    square = (model.hidden_size, model.hidden_size)
    first_norm = f"{prefix}.input_layernorm.weight"
    second_norm = f"{prefix}.post_attention_layernorm.weight"
    part = f"{prefix}.self_attn"

    normed, middle = hidden, hidden  # middle: the stream between the two sub-blocks
    match first:
        case Attention(num_query_groups=groups):
            normed = rms_norm(hidden, weight, first_norm, epsilon)
            middle = hidden + attention(
                normed, angles, weight, prefix=part, model=model, groups=groups
            )
        case Replaced():
            normed = rms_norm(hidden, weight, first_norm, epsilon)
            middle = hidden + linear(normed, weight, f"{part}.linear_attn.weight", square)
        case Absent():
            pass

    d_middle = d_out
    if not isinstance(second, Absent):
        normed_middle = rms_norm(middle, weight, second_norm, epsilon)
        if isinstance(second, Mlp):
            d_normed = _mlp(normed_middle, d_out, weight, f"{prefix}.mlp", second, found)
        else:
            name = f"{prefix}.mlp.linear_mlp.weight"
            d_normed = _linear(normed_middle, d_out, weight, name, found)
        d_middle = d_out + _rms_norm(middle, d_normed, weight, second_norm, epsilon, found)
    match first:
        case Attention(num_query_groups=groups):
            d_normed = _attention(
                normed, d_middle, angles, weight,
                prefix=part, model=model, groups=groups, found=found,
            )  # fmt: skip
        case Replaced():
            d_normed = _linear(normed, d_middle, weight, f"{part}.linear_attn.weight", found)
        case Absent():
            return d_middle
    return d_middle + _rms_norm(hidden, d_normed, weight, first_norm, epsilon, found)


def _attention(
    x: Array,
    d_out: Array,
    angles: Array,
    weight: Weight,
    *,
    prefix: str,
    model: Architecture,
    groups: int,
    found: Gradients,
) -> Array:
    """Through `oracle.attention`: a key or value head gathers from all query heads it serves."""
    batch, seq, hidden = x.shape
    heads, channels = model.num_attention_heads, model.kv_channels
    turn = angles[:, None]

    def split(rows: Array) -> Array:
        """(batch, seq, heads * channels) to (batch, heads, seq, channels)."""
        return rows.reshape(batch, seq, -1, channels).swapaxes(1, 2)

    def join(parts: Array) -> Array:
        return parts.swapaxes(1, 2).reshape(batch, seq, -1)

    def project(name: str, count: int) -> Array:
        return split(linear(x, weight, f"{prefix}.{name}.weight", (count * channels, hidden)))

    query, key = rotate(project("q_proj", heads), turn), rotate(project("k_proj", groups), turn)
    value = project("v_proj", groups)
    share = heads // groups
    future = np.triu(np.ones((seq, seq), dtype=bool), k=1)
    scale = 1 / np.sqrt(channels)

    def attend(head: int) -> Array:
        """Attention weights of one head, (batch, seq, seq)."""
        scores = query[:, head] @ key[:, head // share].swapaxes(1, 2) * scale
        scores[:, future] = -np.inf
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        normalised: Array = scores / scores.sum(axis=-1, keepdims=True)
        return normalised

    mixed = np.stack([attend(head) @ value[:, head // share] for head in range(heads)], axis=1)
    d_mixed = split(_linear(join(mixed), d_out, weight, f"{prefix}.o_proj.weight", found))
    d_query, d_key, d_value = np.zeros_like(query), np.zeros_like(key), np.zeros_like(value)
    for head in range(heads):
        group, probabilities = head // share, attend(head)
        d_value[:, group] += probabilities.swapaxes(1, 2) @ d_mixed[:, head]
        d_probabilities = d_mixed[:, head] @ value[:, group].swapaxes(1, 2)
        centred = d_probabilities - np.sum(d_probabilities * probabilities, -1, keepdims=True)
        d_scores = probabilities * centred * scale
        d_query[:, head] = d_scores @ key[:, group]
        d_key[:, group] += d_scores.swapaxes(1, 2) @ query[:, head]
    # A rotation's transpose turns the other way.
    d_x = _linear(x, join(rotate(d_query, -turn)), weight, f"{prefix}.q_proj.weight", found)
    d_x = d_x + _linear(x, join(rotate(d_key, -turn)), weight, f"{prefix}.k_proj.weight", found)
    return d_x + _linear(x, join(d_value), weight, f"{prefix}.v_proj.weight", found)


def _mlp(x: Array, d_out: Array, weight: Weight, prefix: str, mlp: Mlp, found: Gradients) -> Array:
    """Through `oracle.mlp`; silu'(g) = s (1 + g (1 - s)) with s the sigmoid of g."""
    shape = (mlp.ffn_hidden_size, x.shape[-1])
    gate = linear(x, weight, f"{prefix}.gate_proj.weight", shape)
    up = linear(x, weight, f"{prefix}.up_proj.weight", shape)
    with np.errstate(over="ignore"):  # exp(710) is inf, and the quotient the right zero
        sigmoid = 1 / (1 + np.exp(-gate))
    silu = gate * sigmoid
    d_wide = _linear(silu * up, d_out, weight, f"{prefix}.down_proj.weight", found)
    d_gate = d_wide * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_x = _linear(x, d_gate, weight, f"{prefix}.gate_proj.weight", found)
    return d_x + _linear(x, d_wide * silu, weight, f"{prefix}.up_proj.weight", found)


def _linear(x: Array, d_out: Array, weight: Weight, name: str, found: Gradients) -> Array:
    """Through `oracle.linear`, `y = x W^T`: W gets `d_y^T x` summed over tokens, x gets `d_y W`."""
    rows = d_out.reshape(-1, d_out.shape[-1])
    found[name] = rows.T @ x.reshape(-1, x.shape[-1])
    # Its shape and dtype were checked on the way forward.
    d_x: Array = d_out @ weight(name)[:].astype(np.float64, copy=False)
    return d_x


def _rms_norm(
    x: Array, d_out: Array, weight: Weight, name: str, epsilon: float, found: Gradients
) -> Array:
    """Through `oracle.rms_norm`, `y = u * w` with `u = x / rms`: lengthening x changes no u."""
    inverse_rms = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon)
    unit = x * inverse_rms
    found[name] = np.sum(d_out * unit, axis=(0, 1))
    d_unit = d_out * weight(name)[:].astype(np.float64, copy=False)
    d_x: Array = inverse_rms * (d_unit - unit * np.mean(d_unit * unit, axis=-1, keepdims=True))
    return d_x
