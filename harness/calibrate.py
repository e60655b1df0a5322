"""The measurement behind `suites/thresholds.toml`: how far healthy models are from the truth.

    python -m harness.calibrate --dtype float32 --models 100

draws random Llama models, none to twelve layers deep, and runs each through transformers (the
reference), and through healthy rewritings of it (candidates): another attention kernel, and the
row-parallel products summed in 2 or 4 parts as tensor parallelism does. It reports the reference's
error against the oracle and the candidates' excess, for short and long positions, as JSON. With
`--fault NAME` the candidate carries a small fault instead: the excess that a limit must stay under.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from bridge.storage import philox
from harness.metrics import excess, ulp_of_one
from harness.oracle import forward, read_config
from harness.probes import probes
from harness.toys import hf_tensors
from harness.toys.configs import published_config, shrink

Config = dict[str, Any]
Change = Callable[[Config], Config]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One model on one probe: the reference's error in ulp, and each candidate's excess."""

    model: int
    probe: str
    reference_ulp: float
    excess: Mapping[str, float]


FAULTS: Final[Mapping[str, Change]] = {
    "eps": lambda config: config | {"rms_norm_eps": 1e-6},
    "factor": lambda config: config | {"rope_scaling": config["rope_scaling"] | {"factor": 16.0}},
    "low_freq_factor": lambda config: (
        config | {"rope_scaling": config["rope_scaling"] | {"low_freq_factor": 2.0}}
    ),
}
"""The faults nearest to being harmless, as changes of the candidate's configuration."""


def random_llama(model: int) -> Config:
    """A Llama configuration drawn from a portable stream; every size is a multiple of 4."""
    words: list[int] = philox.raw_words(model, "calibrate", 0, 8).tolist()

    def pick(index: int, choices: Sequence[int]) -> int:
        return choices[words[index] % len(choices)]

    heads = pick(0, (4, 8, 16))  # transformers wants hidden_size divided by it
    return shrink(
        published_config("Llama-3.1-Nemotron-Nano-4B-v1.1"),
        num_attention_heads=heads,
        num_key_value_heads=heads // pick(1, (1, 2, 4)),
        head_dim=pick(2, (8, 16, 24, 32)),
        hidden_size=pick(3, (64, 96, 128, 160, 192)),
        intermediate_size=pick(4, (100, 256, 300, 512, 1280)),
        num_hidden_layers=pick(5, (0, 1, 2, 4, 6, 8, 12)),
        vocab_size=pick(6, (257, 515, 1031)),
    )


def measure(model: int, *, dtype: str, fault: str | None = None) -> list[Measurement]:
    """Run one random model, reference and candidates, on the short and the long probe."""
    import torch

    config = random_llama(model)
    shapes = hf_tensors(read_config(config))
    weights = {name: _draw(name, shape, seed=model) for name, shape in shapes.items()}
    if dtype == "bfloat16":
        weights = {
            name: philox.float32_of_bfloat16(philox.bfloat16_words(values))
            for name, values in weights.items()
        }
    runs = {"reference": _build(config, weights, dtype=dtype)}
    if fault is not None:
        runs[fault] = _build(FAULTS[fault](config), weights, dtype=dtype)
    else:
        runs["eager"] = _build(config, weights, dtype=dtype, attention="eager")
        for parts in (2, 4):
            runs[f"tp{parts}"] = _build(config, weights, dtype=dtype)
            _split_row_parallel(runs[f"tp{parts}"], parts)
    found = []
    for probe in probes(config["vocab_size"], seed=model):
        truth = forward(config, weights.__getitem__, probe.input_ids, probe.position_ids)
        positions = torch.from_numpy(probe.position_ids)[None].expand(len(probe.input_ids), -1)
        logits = {}
        with torch.no_grad():
            for name, run in runs.items():
                out = run(torch.from_numpy(probe.input_ids), position_ids=positions)
                logits[name] = out.logits.float().numpy()
        reference = logits.pop("reference")
        results = {name: excess(ours, reference, truth, 0.0) for name, ours in logits.items()}
        ulp = next(iter(results.values())).reference_error_ulp(dtype)
        found.append(
            Measurement(
                model=model,
                probe=probe.name,
                reference_ulp=ulp,
                excess={name: result.value for name, result in results.items()},
            )
        )
    return found


def _draw(name: str, shape: tuple[int, ...], *, seed: int) -> philox.Float32s:
    values = np.empty(shape, np.float32)
    mean, std = philox.mean_and_std(name, shape)
    philox.fill_float32(values.reshape(-1), seed=seed, name=name, start=0, mean=mean, std=std)
    return values


def _build(
    config: Config, weights: Mapping[str, philox.Float32s], *, dtype: str, attention: str = "sdpa"
) -> Any:  # noqa: ANN401  # transformers' classes are untyped here
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf_config = LlamaConfig(**config, attn_implementation=attention)
    model = LlamaForCausalLM(hf_config).to(getattr(torch, dtype)).eval()
    # casting a whole model rounds inv_freq as well; from_pretrained would not
    model.model.rotary_emb = LlamaRotaryEmbedding(hf_config)
    model.load_state_dict({name: torch.from_numpy(values) for name, values in weights.items()})
    return model


def _split_row_parallel(model: Any, parts: int) -> None:  # noqa: ANN401  # as above
    """Sum o_proj and down_proj over `parts` slices of their input, as an all-reduce does."""
    import torch

    class RowParallel(torch.nn.Module):
        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.slices = weight.detach().chunk(parts, dim=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pieces = zip(x.chunk(parts, dim=-1), self.slices, strict=True)
            products = [torch.nn.functional.linear(piece, weight) for piece, weight in pieces]
            return torch.stack(products).sum(dim=0)

    for layer in model.model.layers:
        layer.self_attn.o_proj = RowParallel(layer.self_attn.o_proj.weight)
        layer.mlp.down_proj = RowParallel(layer.mlp.down_proj.weight)


def summarise(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Least, median and largest of everything measured."""
    series: dict[str, list[float]] = {}
    for one in measurements:
        series.setdefault(f"reference_ulp/{one.probe}", []).append(one.reference_ulp)
        for name, value in one.excess.items():
            series.setdefault(f"excess/{name}/{one.probe}", []).append(value)
    return {
        name: {
            "samples": len(values),
            "min": round(min(values), 4),
            "median": round(float(np.median(values)), 4),
            "max": round(max(values), 4),
        }
        for name, values in sorted(series.items())
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the summary to stdout as JSON."""
    parser = argparse.ArgumentParser(prog="python -m harness.calibrate", description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--fault", choices=sorted(FAULTS))
    parser.add_argument("--each", action="store_true", help="every measurement, not the summary")
    options = parser.parse_args(arguments)
    found = [
        one
        for model in range(options.models)
        for one in measure(model, dtype=options.dtype, fault=options.fault)
    ]
    rows = [{"model": m.model, "probe": m.probe, "ulp": m.reference_ulp, **m.excess} for m in found]
    result = rows if options.each else summarise(found)
    unit = f"one ulp of {options.dtype} at 1.0 is {ulp_of_one(options.dtype):g}"
    sys.stdout.write(json.dumps({"unit": unit, "found": result}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
