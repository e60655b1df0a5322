"""Right weights, wrong sums: RoPE, norms, attention and feed-forward of the live model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from bridge.spec import ModelSpec, NoOp
from harness.faults import traits
from harness.faults.seams import AfterBuild, AfterLoad, Replaced
from harness.hooks import Fault
from harness.ranks import RankContext

Function = Callable[..., Any]

# --------------------------------------------------------------------------------------
# Rotary position embedding
# --------------------------------------------------------------------------------------


def other_angles(change: Function, healthy: Function) -> Function:
    """`change(angles, positions, frequencies)` of what the live rotary module computes."""

    def angles(self: Any, max_seq_len: int, offset: int) -> Any:  # noqa: ANN401 - a module
        import torch

        positions = self.position_ids
        if positions is None:
            positions = torch.arange(offset, offset + max_seq_len)
        return change(healthy(self, max_seq_len, offset), positions.t(), self.inv_freq)

    return angles


def one_later(_angles: Any, positions: Any, frequencies: Any) -> Any:  # noqa: ANN401 - tensors
    """Positions from 1: relative positions, and so all logits, are as before."""
    return (positions + 1).to(frequencies).unsqueeze(-1) * frequencies


def from_zero(_angles: Any, positions: Any, frequencies: Any) -> Any:  # noqa: ANN401 - as above
    """Positions 0..S-1 whatever was asked for: what GPTModel does by itself."""
    import torch

    length = positions.shape[0]
    counted = torch.arange(length).to(frequencies)
    if positions.dim() == 2:
        counted = counted.unsqueeze(-1).expand(positions.shape)
    return counted.unsqueeze(-1) * frequencies


def in_pieces(_angles: Any, positions: Any, frequencies: Any) -> Any:  # noqa: ANN401 - as above
    """A table extended by 6,000 positions at a time that repeats the last row of each piece."""
    repeated = (positions % 6000 == 0) & (positions > 0)
    return (positions - repeated.to(positions.dtype)).to(frequencies).unsqueeze(-1) * frequencies


def backwards(angles: Any, _positions: Any, _frequencies: Any) -> Any:  # noqa: ANN401 - as above
    """Rotation by minus theta."""
    return -angles


def in_bfloat16(angles: Any, _positions: Any, _frequencies: Any) -> Any:  # noqa: ANN401 - as above
    """Angles rounded to eight bits."""
    return angles.bfloat16().to(angles.dtype)


def in_float64(_angles: Any, positions: Any, frequencies: Any) -> Any:  # noqa: ANN401 - as above
    """Products in float64 of frequencies that float32 cannot hold: finer than the definition."""
    finer = frequencies.double() * (1 + 2e-8)
    return (positions.double().unsqueeze(-1) * finer).to(frequencies)


def other_frequencies(change: Function, healthy: Function) -> Function:
    """`change` of the frequencies a live model is given."""

    def compute(*args: Any) -> Any:  # noqa: ANN401 - tensors
        return change(healthy(*args))

    return compute


def rounded(frequencies: Any) -> Any:  # noqa: ANN401 - a tensor
    """To bfloat16: what `model.to(torch.bfloat16)` does to a buffer."""
    return frequencies.bfloat16().float()


def one_ulp(frequencies: Any) -> Any:  # noqa: ANN401 - as above
    """The last frequency is one unit in the last place larger."""
    import torch

    changed = frequencies.clone()
    changed[-1] = torch.nextafter(changed[-1], torch.tensor(float("inf")))
    return changed


def half_of_them(frequencies: Any) -> Any:  # noqa: ANN401 - as above
    """The slower half of the channels is not rotated."""
    changed = frequencies.clone()
    changed[len(changed) - len(changed) // 2 :] = 0
    return changed


def pairs(_healthy: Function) -> Function:
    """Neighbouring channels are turned together: GPT-J's convention."""

    def rotate(x: Any, _interleaved: bool) -> Any:  # noqa: ANN401, FBT001 - Megatron's own call
        import torch

        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    return rotate


# --------------------------------------------------------------------------------------
# Norms
# --------------------------------------------------------------------------------------


def _norms(part: Any) -> list[Any]:  # noqa: ANN401 - a GPTModel
    """Modules that norm their input: Transformer Engine's linears do, replacements as well."""
    return [
        module
        for name, module in part.named_modules()
        if hasattr(module, "layer_norm_weight")
        or (name.endswith("layernorm") and hasattr(module, "weight"))
    ]


def norm_weights(part: Any) -> list[Any]:  # noqa: ANN401 - a GPTModel
    """Of every norm of a part."""
    return [
        module.layer_norm_weight if hasattr(module, "layer_norm_weight") else module.weight
        for module in _norms(part)
    ]


def another_epsilon(own: float) -> float:
    """One so far from the model's own that no rounding hides it."""
    return max(1e-4, 10 * own)


def final_epsilon(part: Any, _spec: ModelSpec, _context: RankContext) -> None:  # noqa: ANN401 - as above
    """The final norm keeps a default epsilon."""
    norm = getattr(part.decoder, "final_layernorm", None)
    if norm is not None:
        norm.eps = another_epsilon(norm.eps)


def centred(part: Any, _spec: ModelSpec, _context: RankContext) -> None:  # noqa: ANN401 - as above
    """LayerNorm, which takes the mean off, in place of RMSNorm."""
    for norm in _norms(part):
        norm.register_forward_pre_hook(_less_the_mean)


def _less_the_mean(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ANN401 - a hook
    return (args[0] - args[0].mean(dim=-1, keepdim=True), *args[1:])


def one_less(part: Any, _spec: ModelSpec, _context: RankContext) -> None:  # noqa: ANN401 - as above
    """Norm weights stored around zero: `layernorm_1p`."""
    for weight in norm_weights(part):
        weight.sub_(1)


def first_norm_ones(part: Any, _spec: ModelSpec, _context: RankContext) -> None:  # noqa: ANN401 - as above
    """A norm left at its initial ones."""
    for weight in norm_weights(part)[:1]:
        weight.fill_(1)


# --------------------------------------------------------------------------------------
# Attention, feed-forward, residual
# --------------------------------------------------------------------------------------


def scale_squared(part: Any, _spec: ModelSpec, _context: RankContext) -> None:  # noqa: ANN401 - as above
    """Scores divided by the head size in place of its root."""
    for module in part.modules():  # Transformer Engine keeps one for each backend
        if isinstance(getattr(module, "softmax_scale", None), float):
            module.softmax_scale = module.softmax_scale**2


def looks_ahead(healthy: Function) -> Function:
    """Every token sees its successor."""

    def mask(parts: Any, input_ids: Any) -> Any:  # noqa: ANN401 - as above
        found = healthy(parts, input_ids)
        return None if found is None else found.tril(-2) | found.triu(2)

    return mask


def tiled(healthy: Function) -> Function:
    """Groups repeated one after the other: 0 1 0 1 in place of 0 0 1 1."""

    def repeat(self: Any, times: Any, dim: int | None = None, **kwargs: Any) -> Any:  # noqa: ANN401 - torch's own
        if dim == 2 and self.dim() == 4 and not kwargs:
            return self.repeat(1, 1, times, 1)
        return healthy(self, times, dim=dim, **kwargs)

    return repeat


def gelu(healthy: Function) -> Function:
    """GeGLU for SwiGLU."""

    def config(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the function's own
        import torch

        found = healthy(*args, **kwargs)
        found.activation_func = torch.nn.functional.gelu
        return found

    return config


def _with_layer(wanted: Callable[[ModelSpec, int], bool], hook: Function, part: Any, spec: ModelSpec,  # noqa: ANN401, E501 - as above
                _context: RankContext) -> None:  # fmt: skip
    for layer in part.decoder.layers:
        if wanted(spec, layer.layer_number - 1):
            layer.register_forward_hook(hook, with_kwargs=True)


def _is_no_op(spec: ModelSpec, layer_idx: int) -> bool:
    return NoOp() in (spec.blocks[layer_idx].attention, spec.blocks[layer_idx].ffn)


def _is_first_wide(spec: ModelSpec, layer_idx: int) -> bool:
    empty = [spec.blocks[i].attention == spec.blocks[i].ffn == NoOp() for i in range(layer_idx + 1)]
    return not empty[-1] and all(empty[:-1])


def _hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401 - a tensor
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def _twice(_layer: Any, args: Any, kwargs: Any, output: Any) -> Any:  # noqa: ANN401 - a hook
    """The sub-block that is not there gives back its input, which is added."""
    hidden, *rest = output if isinstance(output, tuple) else (output,)
    changed = hidden + _hidden_of(args, kwargs)
    return (changed, *rest) if isinstance(output, tuple) else changed


def _skipped(_layer: Any, args: Any, kwargs: Any, output: Any) -> Any:  # noqa: ANN401 - a hook
    hidden = _hidden_of(args, kwargs)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _without_residual(_layer: Any, args: Any, kwargs: Any, output: Any) -> Any:  # noqa: ANN401 - a hook
    hidden, *rest = output if isinstance(output, tuple) else (output,)
    changed = hidden - _hidden_of(args, kwargs)
    return (changed, *rest) if isinstance(output, tuple) else changed


def _few_bits(_layer: Any, args: Any, kwargs: Any, output: Any) -> Any:  # noqa: ANN401 - a hook
    """The change that the block makes loses three of its 24 bits."""
    hidden, *rest = output if isinstance(output, tuple) else (output,)
    before = _hidden_of(args, kwargs)
    change = hidden - before
    big = change * (2.0**COARSE + 1)
    changed = before + (big - (big - change))
    return (changed, *rest) if isinstance(output, tuple) else changed


COARSE: Final = 5
"""Bits that the coarse block loses: a few times its own error, under a twice of the model's."""


def biased(part: Any, spec: ModelSpec, _context: RankContext) -> None:  # noqa: ANN401 - as above
    """Linear replacements with a bias that the checkpoint does not have."""
    from bridge.spec import Linear

    for layer in part.decoder.layers:
        block = spec.blocks[layer.layer_number - 1]
        for name, kind in (("self_attention", block.attention), ("mlp", block.ffn)):
            if kind == Linear():
                getattr(layer, name).register_forward_hook(_plus_bias)


def _plus_bias(_module: Any, _args: Any, output: Any) -> Any:  # noqa: ANN401 - a hook
    return (output[0] + 0.01, *output[1:])


def far_temperature(part: Any, _spec: ModelSpec, _context: RankContext) -> None:  # noqa: ANN401 - as above
    """Logits beyond the original context are cooled down."""
    if getattr(part, "output_layer", None) is None or not part.post_process:
        return
    healthy = part.forward

    def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the function's own
        import torch

        logits = healthy(*args, **kwargs)
        positions = kwargs.get("position_ids")
        if positions is None:
            return logits
        scale = torch.where(positions >= 8192, 1.1, 1.0).to(logits.dtype)
        return logits * (scale if positions.dim() == 2 else scale[None])[..., None]

    part.forward = forward


_rope = partial(Fault, family="rope", applies=traits.has_attention)
_norm = partial(Fault, family="norm")
_sum = partial(Fault, family="arithmetic")
_ANGLES: Final = ("bridge.rotary", "PositionedRotaryEmbedding._angles")
_ROTATE: Final = ("megatron.core.models.common.embeddings.rope_utils", "_rotate_half")


def _angles(change: Function) -> Replaced:
    return Replaced(*_ANGLES, partial(other_angles, change))


def _frequencies(change: Function) -> Replaced:
    return Replaced("bridge.model", "inv_freq", partial(other_frequencies, change))


FAULTS: Final = (
    _rope(name="rope-positions-from-one", stands_for="position_ids that begin at 1",
          rank=_angles(one_later)),
    _rope(name="rope-positions-ignored", stands_for="GPTModel rotates by 0..S-1 whatever is asked",
          rank=_angles(from_zero)),
    _rope(name="rope-table-in-pieces", stands_for="a cache of angles that is extended off by one",
          rank=_angles(in_pieces)),
    _rope(name="rope-backwards", stands_for="rotation by minus theta",
          rank=_angles(backwards)),
    _rope(name="rope-angles-bfloat16", stands_for="angles computed in the activations' dtype",
          rank=_angles(in_bfloat16)),
    _rope(name="rope-angles-finer", stands_for="angles in float64, which no release computes in",
          rank=_angles(in_float64)),
    _rope(name="rope-frequencies-bfloat16", stands_for="model.to(bfloat16) that rounds inv_freq",
          rank=_frequencies(rounded)),
    _rope(name="rope-one-ulp", stands_for="inv_freq from another library's power function",
          rank=_frequencies(one_ulp)),
    _rope(name="rope-half-the-channels", stands_for="rotary_percent 0.5",
          rank=_frequencies(half_of_them)),
    _rope(name="rope-interleaved", stands_for="rotary_interleaved: GPT-J's pairs",
          rank=Replaced(*_ROTATE, pairs)),
    _norm(name="final-norm-epsilon", stands_for="an epsilon that reaches every norm but the last",
          rank=AfterBuild(final_epsilon)),
    _norm(name="norm-centred", stands_for="LayerNorm for RMSNorm", rank=AfterBuild(centred)),
    _norm(name="norm-one-less", stands_for="layernorm_1p: weights kept around zero",
          rank=AfterLoad(one_less)),
    _norm(name="norm-left-at-ones", stands_for="a norm that was not loaded",
          rank=AfterLoad(first_norm_ones)),
    _sum(name="attention-scale", stands_for="scores divided twice by the root of the head size",
         applies=traits.has_attention, rank=AfterBuild(scale_squared)),
    _sum(name="mask-off-by-one", stands_for="a causal mask that lets the next token through",
         applies=traits.has_attention, local_only=True,
         rank=Replaced("bridge.forward", "_causal_mask", looks_ahead)),
    _sum(name="groups-tiled", stands_for="repeat for repeat_interleave over the query groups",
         applies=traits.has_shared_groups,
         rank=Replaced("torch", "Tensor.repeat_interleave", tiled)),
    _sum(name="gelu-for-silu", stands_for="activation_func left at Megatron's default",
         applies=traits.has_swiglu, rank=Replaced("bridge.model", "transformer_config", gelu)),
    _sum(name="no-op-adds-its-input", stands_for="a no-op run as identity inside the residual",
         applies=traits.has_no_op, rank=AfterBuild(partial(_with_layer, _is_no_op, _twice))),
    _sum(name="block-skipped", stands_for="a block taken for a no-op",
         rank=AfterBuild(partial(_with_layer, _is_first_wide, _skipped))),
    _sum(name="residual-dropped", stands_for="a block whose residual is not added",
         rank=AfterBuild(partial(_with_layer, _is_first_wide, _without_residual))),
    _sum(name="block-coarse", stands_for="one block computed in less precision than the others",
         rank=AfterBuild(partial(_with_layer, _is_first_wide, _few_bits))),
    _sum(name="linear-biased", stands_for="linear replacements built with their default bias",
         applies=traits.has_linear, rank=AfterBuild(biased)),
    _sum(name="far-temperature", stands_for="a long-context temperature left on",
         rank=AfterBuild(far_temperature)),
)  # fmt: skip
