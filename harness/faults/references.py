"""Wrong witnesses: the Hugging Face model, the oracle, and the numbers that stand for both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from harness.faults import traits
from harness.faults.arithmetic import another_epsilon
from harness.faults.seams import Replaced
from harness.hooks import Fault

Config = dict[str, Any]


def _layers(model: Any) -> list[Any]:  # noqa: ANN401 - transformers is not typed
    return list(model.model.layers)


def scale_final_norm(model: Any) -> None:  # noqa: ANN401 - as above
    """The final norm times 1.001."""
    model.model.norm.weight.data *= 1.001


def new_output_layer(model: Any) -> None:  # noqa: ANN401 - as above
    """An output layer that was not in the file: initialised, with a line in a log."""
    import torch

    weight = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(torch.full_like(weight, 0.02))


def garbage_frequencies(model: Any) -> None:  # noqa: ANN401 - as above
    """A buffer that loading through the meta device left uninitialised."""
    model.model.rotary_emb.inv_freq.zero_()


def rounded_frequencies(model: Any) -> None:  # noqa: ANN401 - as above
    """`model.to(torch.bfloat16)` and back."""
    frequencies = model.model.rotary_emb.inv_freq
    frequencies.copy_(frequencies.bfloat16().float())


def other_epsilon(model: Any) -> None:  # noqa: ANN401 - as above
    """The norms' epsilon is another."""
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = another_epsilon(module.variance_epsilon)


def gelu(model: Any) -> None:  # noqa: ANN401 - as above
    """Another activation after the gate."""
    import torch

    for layer in _layers(model):
        gate = getattr(getattr(layer, "mlp", None), "gate_proj", None)
        if gate is not None:
            gate.register_forward_hook(partial(_as_gelu, torch.nn.functional))


def _as_gelu(functional: Any, _module: Any, _args: Any, output: Any) -> Any:  # noqa: ANN401 - a hook
    """Shift the gate by what the two activations differ by: then silu of it is neither."""
    return output + (functional.gelu(output) - functional.silu(output))


def crossed_cache(model: Any) -> None:  # noqa: ANN401 - as above
    """With a cache, decoding sees the past in the wrong place: a single forward pass has none."""
    for layer in _layers(model):
        attention = getattr(layer, "self_attn", None)
        if attention is not None and hasattr(attention, "k_proj"):
            attention.k_proj.register_forward_hook(_late_key)


def _late_key(_module: Any, args: Any, output: Any) -> Any:  # noqa: ANN401 - a hook
    """A step of one token stores its key with the wrong sign."""
    return -output if args[0].shape[1] == 1 else output


def skipped_block(model: Any) -> None:  # noqa: ANN401 - as above
    """The first feed-forward or attention is left out."""
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "linear_mlp.weight")):
            parameter.data.zero_()
            return


def config_epsilon(config: Config) -> Config:
    """The oracle reads another epsilon."""
    return config | {"rms_norm_eps": another_epsilon(config["rms_norm_eps"])}


def config_factor(config: Config) -> Config:
    """The oracle reads another RoPE factor."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    return config | {key: config[key] | {"factor": config[key]["factor"] * 2}}


def other_stream(healthy: Callable[..., Any]) -> Callable[..., Any]:
    """A random stream that begins one word later."""

    def stream(seed: int, name: str, start: int) -> Any:  # noqa: ANN401 - a generator
        return healthy(seed, name, start + 1)

    return stream


_reference = partial(Fault, family="reference")

FAULTS: Final = (
    _reference(name="reference-norm-scaled", stands_for="a reference that was fine-tuned since",
               reference=scale_final_norm),
    _reference(name="reference-output-new",
               stands_for="a missing tensor, initialised with a warning",
               applies=traits.is_untied, reference=new_output_layer),
    _reference(name="reference-frequencies-lost",
               stands_for="remote code under transformers 5.2: inv_freq never filled",
               applies=traits.has_attention, reference=garbage_frequencies),
    _reference(name="reference-frequencies-bfloat16", stands_for="a reference cast as a whole",
               applies=traits.has_attention, reference=rounded_frequencies),
    _reference(name="reference-epsilon", stands_for="a port with its own default epsilon",
               reference=other_epsilon),
    _reference(name="reference-activation", stands_for="hidden_act ignored by a port",
               applies=traits.has_swiglu, reference=gelu),
    _reference(name="reference-block-skipped", stands_for="a port that takes a block for a no-op",
               reference=skipped_block),
    _reference(name="reference-cache-crossed",
               stands_for="remote code under transformers 4.57: wrong tokens with a cache",
               applies=traits.has_attention, reference=crossed_cache),
    _reference(name="oracle-epsilon", stands_for="an oracle with another epsilon",
               oracle=config_epsilon),
    _reference(name="oracle-rope-factor", stands_for="an oracle with another RoPE factor",
               applies=traits.is_scaled, oracle=config_factor),
    _reference(name="random-stream-moved", stands_for="a NumPy whose Philox stream changed",
               only_recorded=True,
               code=Replaced("bridge.storage.philox", "word_stream", other_stream)),
)  # fmt: skip
