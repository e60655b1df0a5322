"""The Hugging Face model, a segment at a time: the real class, with one layer that is refilled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from bridge.hf_config import CONFIG_NAME
from bridge.hf_fields import CARRIED
from bridge.tiling import Tile, Tiling
from harness.errors import ReferenceUnavailableError
from harness.probes import Probe
from harness.streaming.arena import Arena, give
from harness.streaming.reading import HeldSource, fill
from harness.streaming.segments import Segment

Array = np.ndarray[Any, np.dtype[Any]]
Module = Any
"""transformers is not typed."""


class _Nothing(torch.nn.Module):
    """Stands for the half of a layer that another segment computes: what it adds is zero."""

    def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class _OneLayer:
    """A model of one layer, its matrices on no device, taken apart as the walk wants it."""

    def __init__(self, config: Mapping[str, Any], device: torch.device) -> None:
        model = _empty_model(config)
        base, (layer,) = model.model, model.model.layers
        base.embed_tokens.padding_idx = None  # of the whole vocabulary, and only for gradients
        self.whole = base
        self.parts: dict[str, Module] = {
            "model.embed_tokens": base.embed_tokens,
            "model.norm": base.norm,
            "lm_head": model.lm_head,
            **{
                name: module
                for name in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
                if (module := getattr(layer, name)) is not None
            },
        }
        base.norm = torch.nn.Identity()
        if layer.mlp is not None:
            layer.mlp, layer.post_attention_layernorm = _Nothing(), torch.nn.Identity()
        base.rotary_emb.to(device)


def _empty_model(config: Mapping[str, Any]) -> Module:
    """A transformers model whose parameters have no memory; what it computes by itself does."""
    import huggingface_hub.errors
    import transformers

    import bridge.decilm  # noqa: F401 - registers DeciLM with the Auto classes

    # What computes, and nothing that only classes and names are made of.
    fields = {name: value for name, value in config.items() if name not in {"model_type", *CARRIED}}
    # By name: releases of the hub's client before 1.0 have none, and raise the others.
    strict = getattr(huggingface_hub.errors, "StrictDataclassError", ValueError)
    try:
        read = transformers.AutoConfig.for_model(config["model_type"], **fields)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                read, attn_implementation="eager", trust_remote_code=False
            )
    except (ValueError, TypeError, AttributeError, KeyError, AssertionError, strict) as error:
        raise ReferenceUnavailableError(
            f"transformers does not take this configuration: {' '.join(str(error).split())}",
            where=CONFIG_NAME,
        ) from error
    rotary = model.model.rotary_emb
    if any(one.is_meta for one in rotary.buffers()):
        model.model.rotary_emb = type(rotary)(config=model.config)
    return model.eval()


class Reference:
    """transformers' Llama, or `bridge.decilm`'s model, as a `Backend`.

    Args:
        config: The parsed `config.json`.
        dtype: Of weights and states.
        arena: Where the weights go.
        device: Where it is.
    """

    def __init__(
        self, config: Mapping[str, Any], *, dtype: torch.dtype, arena: Arena, device: torch.device
    ) -> None:
        self._config, self._dtype, self._device = config, dtype, device
        self._arena = arena
        self._made: dict[str, _OneLayer] = {}
        self._model: _OneLayer | None = None
        self._tokens = np.empty(0, np.int64)

    def load(self, segment: Segment, source: HeldSource) -> None:
        """Fill the layer from the boxes of the segment, each of which is all of a parameter."""
        self._model = model = self._of(segment.layer_idx or 0)
        self._arena.clear()
        if segment.part == "embedding":
            self._tokens = np.array([box.starts[0] for _, box in segment.boxes])
            (name,) = {name for name, _ in segment.boxes}
            self._fill(model, name, Tiling.concatenate(segment.boxes), source)
            return
        for name, box in segment.boxes:
            rows = Tiling(box.shape, (Tile(name, box, box.relative_to(box)),))
            is_output = segment.part == "head" and name == "model.embed_tokens.weight"
            self._fill(model, "lm_head.weight" if is_output else name, rows, source)

    def _of(self, layer_idx: int) -> _OneLayer:
        config = dict(self._config) | {"num_hidden_layers": 1, "tie_word_embeddings": False}
        if config.get("block_configs") is not None:
            config["block_configs"] = [config["block_configs"][layer_idx]]
        key = json.dumps(config.get("block_configs"), sort_keys=True)
        if key not in self._made:
            self._made[key] = _OneLayer(config, self._device)
        return self._made[key]

    def _fill(self, model: _OneLayer, name: str, tiling: Tiling, source: HeldSource) -> None:
        if name.startswith("model.layers."):
            name = name.split(".", 3)[3]
        part = next(one for one in model.parts if name.startswith(f"{one}."))
        tensor = self._arena.take(tiling.shape)
        fill(tensor, tiling, source)
        give(model.parts[part], name.removeprefix(f"{part}."), tensor)

    def embed(self, probes: Sequence[Probe]) -> list[torch.Tensor]:
        """See `Backend`."""
        rows = [np.searchsorted(self._tokens, probe.input_ids) for probe in probes]
        embedding = self._parts["model.embed_tokens"]
        with torch.no_grad():
            return [embedding(torch.from_numpy(one).to(self._device)) for one in rows]

    def attention(
        self, states: Sequence[torch.Tensor], probes: Sequence[Probe]
    ) -> list[torch.Tensor]:
        """See `Backend`."""
        if self._model is None:
            raise AssertionError("nothing is loaded")
        found = []
        for state, probe in zip(states, probes, strict=True):
            shape = state.shape[:2]
            positions = torch.from_numpy(probe.position_ids).expand(shape).to(self._device)
            with torch.no_grad():
                output = self._model.whole(
                    inputs_embeds=state,
                    position_ids=positions,
                    # As in `reference.hf_logits`: gaps in positions are not packed sequences.
                    attention_mask=torch.ones(shape, dtype=torch.int64, device=self._device),
                    use_cache=False,
                )
            found.append(output.last_hidden_state)
        return found

    def ffn(self, states: Sequence[torch.Tensor], _probes: Sequence[Probe]) -> list[torch.Tensor]:
        """See `Backend`."""
        if "mlp" not in self._parts:
            return list(states)
        return [state + change for state, change in zip(states, self._mlp(states), strict=True)]

    def ffn_slice(self, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `Backend`."""
        return [one.float() for one in self._mlp(states)]

    def _mlp(self, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        norm, mlp = self._parts["post_attention_layernorm"], self._parts["mlp"]
        with torch.no_grad():
            return [mlp(norm(state)) for state in states]

    def added(self, state: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """See `Backend`."""
        return state + change.to(self._dtype)

    def head(self, states: Sequence[torch.Tensor], _probes: Sequence[Probe]) -> list[Array]:
        """See `Backend`."""
        norm, output = self._parts["model.norm"], self._parts["lm_head"]
        with torch.no_grad():
            return [self.plain(output(norm(state))) for state in states]

    def plain(self, state: torch.Tensor) -> Array:
        """See `Backend`."""
        return plain(state)

    def taken(self, state: Array) -> torch.Tensor:
        """See `Backend`."""
        return torch.from_numpy(state).to(device=self._device, dtype=self._dtype)

    @property
    def _parts(self) -> dict[str, Module]:
        if self._model is None:
            raise AssertionError("nothing is loaded")
        return self._model.parts


def plain(state: torch.Tensor) -> Array:
    """A tensor as numbers of numpy: float64 as it is, any other as float32, exactly."""
    wide = state if state.dtype == torch.float64 else state.float()
    found: Array = wide.detach().cpu().numpy()
    return found
