"""The oracle against transformers, and the verdict rule against faulty models, on every toy.

The torch models here are put together from transformers' own Llama parts, block by block, so that
heterogeneous toys have a reference that shares nothing with the bridge or the oracle.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from harness import oracle
from harness.probes import Probe, probes
from harness.thresholds import EXCESS, judge_logits
from harness.toys import TOYS, Toy

Config = dict[str, Any]
Weights = dict[str, torch.Tensor]

LLAMA_TOYS = tuple(name for name, toy in TOYS.items() if "block_configs" not in toy.config)


class TorchModel(torch.nn.Module):
    """Llama or DeciLM from transformers' Llama parts, in float32 or in true float64."""

    def __init__(self, config: Config, *, dtype: torch.dtype) -> None:
        """Build the blocks; weights come by `load_state_dict`."""
        super().__init__()
        self.exact = dtype == torch.float64
        self.base = self._llama_config(config)
        hidden, eps = self.base.hidden_size, self.base.rms_norm_eps
        norm = torch.nn.RMSNorm if self.exact else LlamaRMSNorm
        self.model: Any = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(self.base.vocab_size, hidden)
        self.model.norm = norm(hidden, eps=eps)
        self.model.layers = torch.nn.ModuleList()
        entries = config.get("block_configs") or [None] * config["num_hidden_layers"]
        for layer_idx, entry in enumerate(entries):
            layer: Any = torch.nn.Module()
            attention, ffn = (entry["attention"], entry["ffn"]) if entry else ({}, {})
            part = self._llama_config(config, attention, ffn)
            if not attention.get("no_op"):
                layer.input_layernorm = norm(hidden, eps=eps)
                if attention.get("replace_with_linear"):
                    layer.self_attn = torch.nn.Module()
                    layer.self_attn.linear_attn = torch.nn.Linear(hidden, hidden, bias=False)
                else:
                    layer.self_attn = LlamaAttention(part, layer_idx)
            if not ffn.get("no_op"):
                layer.post_attention_layernorm = norm(hidden, eps=eps)
                if ffn.get("replace_with_linear"):
                    layer.mlp = torch.nn.Module()
                    layer.mlp.linear_mlp = torch.nn.Linear(hidden, hidden, bias=False)
                else:
                    layer.mlp = LlamaMLP(part)
            self.model.layers.append(layer)
        self.lm_head = torch.nn.Linear(hidden, self.base.vocab_size, bias=False)
        if config.get("tie_word_embeddings"):
            self.lm_head.weight = self.model.embed_tokens.weight
        self.to(dtype)
        self.rotary: Any = LlamaRotaryEmbedding(self.base)

    @staticmethod
    def _llama_config(
        config: Config, attention: Mapping[str, Any] | None = None, ffn: Mapping[str, Any] = {}
    ) -> LlamaConfig:
        attention = attention or {}
        plain = {k: v for k, v in config.items() if k not in {"block_configs", "auto_map"}}
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        groups = plain["num_key_value_heads"] or attention.get("num_key_value_heads")
        if attention.get("n_heads_in_group"):
            groups = heads // attention["n_heads_in_group"]
        width = plain["intermediate_size"] or ffn.get("intermediate_size")
        if ffn.get("ffn_mult"):
            width = math.ceil(int(2 * ffn["ffn_mult"] * hidden / 3) / 256) * 256
        plain |= {"num_key_value_heads": groups or heads, "intermediate_size": width or 1}
        plain |= {"model_type": "llama", "attn_implementation": "sdpa"}
        return LlamaConfig(**copy.deepcopy(plain))

    def forward(self, probe: Probe) -> torch.Tensor:
        """Logits of a probe."""
        hidden: torch.Tensor = self.model.embed_tokens(torch.from_numpy(probe.input_ids))
        positions = torch.from_numpy(probe.position_ids)[None]
        cos, sin = self.rotary(hidden, positions)
        if self.exact:  # transformers takes the cosine in float32; the angle alone should be
            angles = positions[..., None].float() * self.rotary.inv_freq
            angles = torch.cat((angles, angles), dim=-1).double()
            cos, sin = angles.cos(), angles.sin()
        for layer in self.model.layers:
            if hasattr(layer, "self_attn"):
                x = layer.input_layernorm(hidden)
                if isinstance(layer.self_attn, LlamaAttention):
                    hidden = hidden + layer.self_attn(x, (cos, sin), None)[0]
                else:
                    hidden = hidden + layer.self_attn.linear_attn(x)
            if hasattr(layer, "mlp"):
                x = layer.post_attention_layernorm(hidden)
                ffn = layer.mlp if isinstance(layer.mlp, LlamaMLP) else layer.mlp.linear_mlp
                hidden = hidden + ffn(x)
        logits: torch.Tensor = self.lm_head(self.model.norm(hidden))
        return logits


def _weights(toy: Toy, *, seed: int = 0) -> Weights:
    found = {name: torch.from_numpy(values.copy()) for name, values in toy.weights(seed)}
    if toy.config["tie_word_embeddings"]:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return found


def _run(
    config: Config, weights: Weights, probe: Probe, dtype: torch.dtype
) -> np.ndarray[Any, Any]:
    model = TorchModel(config, dtype=dtype)
    model.load_state_dict(weights)
    with torch.no_grad():
        logits = model(probe)
    return np.asarray(logits.numpy())


def _truth(toy: Toy, probe: Probe) -> oracle.Array:
    return oracle.forward(toy.config, toy.weight(), probe.input_ids, probe.position_ids)


def _relative(found: np.ndarray[Any, Any], truth: oracle.Array) -> float:
    return float(np.sqrt(np.mean((found - truth) ** 2) / np.mean(truth**2)))


@pytest.mark.parametrize("name", TOYS)
def test_every_toy_agrees_with_float64_torch_to_float64_rounding(name: str) -> None:
    """With the same float32 angles, torch in float64 and the oracle agree, far and near.

    Measured: 1.1e-15 to 2.3e-15, that is 5 to 10 ulp of float64, as many as float32 runs have.
    """
    toy = TOYS[name]
    for probe in probes(toy.config["vocab_size"]):
        found = _run(toy.config, _weights(toy), probe, torch.float64)
        assert _relative(found, _truth(toy, probe)) < 1e-14, probe.name


@pytest.mark.parametrize("name", LLAMA_TOYS)
def test_transformers_in_float32_agrees_to_float32_rounding_at_long_positions(name: str) -> None:
    """LlamaForCausalLM as it is, in float32, is within 1e-6 of the oracle, far and near."""
    toy = TOYS[name]
    model = LlamaForCausalLM(LlamaConfig(**copy.deepcopy(toy.config))).eval()
    model.load_state_dict(_weights(toy))
    for probe in probes(toy.config["vocab_size"]):
        positions = torch.from_numpy(probe.position_ids)[None].expand(len(probe.input_ids), -1)
        with torch.no_grad():
            found = model(torch.from_numpy(probe.input_ids), position_ids=positions).logits
        assert _relative(found.numpy(), _truth(toy, probe)) < 1e-6, probe.name


# --------------------------------------------------------------------------------------
# Faults
# --------------------------------------------------------------------------------------

Fault = Callable[[Config, Weights], object]


def _swap_gate_and_up(_: Config, weights: Weights) -> object:
    name = next(name for name in weights if name.endswith("mlp.gate_proj.weight"))
    other = name.replace("gate", "up")
    weights[name], weights[other] = weights[other], weights[name]
    return name


def _swap_k_heads(config: Config, weights: Weights) -> object:
    channels = oracle.read_config(config).kv_channels
    names = [
        name
        for name, values in weights.items()
        if name.endswith("k_proj.weight") and values.shape[0] >= 2 * channels
    ]
    values = weights[names[-1]]
    heads = values.reshape(-1, channels, values.shape[-1])
    weights[names[-1]] = torch.cat([heads[1:2], heads[:1], heads[2:]]).flatten(0, 1)
    return names[-1]


def _other_rope_factor(config: Config, _: Weights) -> object:
    scaling = config.get("rope_scaling") or config["rope_parameters"]
    scaling["factor"] = 8.0 if scaling["factor"] == 16.0 else 16.0
    return scaling


def _other_low_freq_factor(config: Config, _: Weights) -> object:
    scaling = config.get("rope_scaling") or config["rope_parameters"]
    scaling["low_freq_factor"] = 2.0
    return scaling


def _other_eps(config: Config, _: Weights) -> object:
    config["rms_norm_eps"] = 1e-6
    return config


def _norm_weight_left_out(_: Config, weights: Weights) -> object:
    name = next(name for name in reversed(weights) if "layernorm" in name)
    weights[name] = torch.ones_like(weights[name])
    return name


def _norm_slightly_scaled(_: Config, weights: Weights) -> object:
    name = next(name for name in weights if "layernorm" in name)
    weights[name] = weights[name] * 1.001
    return name


def _transposed_linear(_: Config, weights: Weights) -> object:
    name = next((name for name in weights if "linear_" in name), None)
    if name is not None:
        weights[name] = weights[name].T.contiguous()
    return name


FAULTS: Mapping[str, Fault] = {
    "gate and up swapped": _swap_gate_and_up,
    "two K heads swapped": _swap_k_heads,
    "another RoPE factor": _other_rope_factor,
    "another low_freq_factor": _other_low_freq_factor,
    "eps 1e-6 for 1e-5": _other_eps,
    "a norm's weight left out": _norm_weight_left_out,
    "a norm scaled by 1.001": _norm_slightly_scaled,
    "a linear replacement transposed": _transposed_linear,
}


@pytest.mark.parametrize("name", TOYS)
def test_the_verdict_catches_each_fault_in_float32_and_spares_the_healthy_model(name: str) -> None:
    """On every toy, each fault fails the excess verdict on a probe; the sound model passes both."""
    toy = TOYS[name]
    both = probes(toy.config["vocab_size"])
    truths = [_truth(toy, probe) for probe in both]
    references = [_run(toy.config, _weights(toy), probe, torch.float32) for probe in both]
    for reference, truth in zip(references, truths, strict=True):
        assert judge_logits(reference, reference, truth, dtype="float32").passed
    for fault, apply in FAULTS.items():
        config, weights = copy.deepcopy(toy.config), _weights(toy)
        if apply(config, weights) is None:
            assert fault == "a linear replacement transposed"
            assert name not in {"51b", "puzzle"}
            continue
        caught = []
        for probe, reference, truth in zip(both, references, truths, strict=True):
            found = _run(config, weights, probe, torch.float32)
            judged = judge_logits(found, reference, truth, dtype="float32")
            failed = [verdict.name for verdict in judged.verdicts if not verdict.passed]
            assert failed in ([], [EXCESS]), (fault, probe.name)
            caught += failed
        assert caught, fault
