"""What the bridge makes of a model: everything that a golden holds, field by field."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import numpy as np

from bridge import hf_config
from bridge.dtypes import Dtype, dtype_named
from bridge.errors import BridgeError
from bridge.megatron_args import checkpoint_args, megatron_lm_flags
from bridge.plan import Plan
from bridge.spec import ModelSpec, tensor_parallel_problems
from bridge.storage import philox
from bridge.storage.safetensors import SafetensorsSource
from harness.bench import BASE_LAYOUT, Bench
from harness.golden.cases import PREFIX, golden_model
from harness.golden.tensors import describe_tensor, describe_tensors, read_torch_dist
from harness.probes import Probe, random_ids
from harness.suite import DTYPES, Case

Json = Any
Field = Callable[[], Json]

_TP: Final = 2
_POSITIONS: Final = (0, 1, 2, 3, 5, 9, 31, 64, 255, 2000, 8192, 30_011, 65_536, 100_003, 131_071)
"""Near ones, and far ones on both sides of the original context of 8192."""
_COLUMNS: Final = 24
_DIGITS: Final = 10


def entry_name(model: str, dtype: str) -> str:
    """What the record of a model is called: `released-02`, or `toy-super-49b-v1-float32`."""
    return model.removeprefix(PREFIX) if model.startswith(PREFIX) else f"toy-{model}-{dtype}"


def header(case: Case) -> dict[str, Json]:
    """What a record is of."""
    found: dict[str, Json] = {
        "name": entry_name(case.model, case.dtype),
        "model": case.model,
        "dtype": case.dtype,
    }
    if case.model.startswith(PREFIX):
        model = golden_model(case.model)
        found |= {"seed": model.seed, "traits": dict(model.factors)}
    return found


def fields(case: Case, bench: Bench) -> dict[str, Field]:
    """Everything that is on record of a model, to be called one by one.

    A toy has fewer: its weights are hashed as they are stored and not again as they are converted,
    since other checks hold every one of its elements, and of its logits there is a sample.
    """
    spec = bench.spec(case)
    plan = Plan(spec, spec.padded_vocab_size(1))
    probe = probe_of(case, bench)
    layout = bench.layout(case, BASE_LAYOUT)
    of_the_bridge: dict[str, Field] = {
        "spec": lambda: spec_as_data(spec),
        "inv_freq": lambda: _inv_freq(spec),
        "args": lambda: _plain(checkpoint_args(spec, layout)),
        "flags": lambda: _flags(spec),
        "exported_config": lambda: _plain(hf_config.hf_config_from_spec(spec)),
        "plan": lambda: list(plan.lines()),
        "tp2_tensors": lambda: _rank_tensors(case, bench, spec),
    }
    found: dict[str, Field] = {
        "config": lambda: bench.config(case),
        **{name: partial(_changed, bench, make) for name, make in of_the_bridge.items()},
        "stream": partial(_changed, bench, _stream),
        "hf_tensors": lambda: bench.stored_tensors(case),
    }
    if case.model.startswith(PREFIX):
        found["megatron_tensors"] = lambda: describe_tensors(read_torch_dist(bench.converted(case)))
    return found | {
        "probe": lambda: {
            "input_ids": probe.input_ids[0].tolist(),
            "position_ids": probe.position_ids.tolist(),
            "columns": columns_of(case, bench),
        },
        "logits": lambda: _logits(case, bench, probe),
    }


def _changed(bench: Bench, make: Field) -> Json:
    # Around the bridge's own functions only: what the bench gives has been through it already,
    # and a swap that is entered twice is none.
    with bench.fault.changed_code():
        return make()


def probe_of(case: Case, bench: Bench) -> Probe:
    """What the logits are recorded on: one sequence of near and far positions."""
    config = bench.config(case)
    last = config["max_position_embeddings"] - 1
    chosen = sorted({one for one in _POSITIONS if one < last} | {last})
    if not case.model.startswith(PREFIX):
        chosen = [*chosen[:3], *chosen[-3:]]
    ids = random_ids(config["vocab_size"], (1, len(chosen)), seed=0, name="golden")
    positions = np.array(chosen, dtype=np.int64)
    return Probe(name="golden", input_ids=ids, position_ids=positions)


def columns_of(case: Case, bench: Bench) -> list[int]:
    """Tokens whose logits are recorded: the first, the last, and some between."""
    last = bench.config(case)["vocab_size"] - 1
    count = min(_COLUMNS, last + 1)
    return [index * last // max(1, count - 1) for index in range(count)]


def spec_as_data(spec: ModelSpec) -> dict[str, Json]:
    """A model as plain data; a sub-block by its kind and sizes."""
    found = {
        one.name: getattr(spec, one.name)
        for one in dataclasses.fields(spec)
        if one.name not in {"blocks", "rope"}
    }
    scaling = spec.rope.scaling
    return {
        **found,
        "rotary_base": spec.rope.rotary_base,
        "rope_scaling": None if scaling is None else dataclasses.asdict(scaling),
        "blocks": [f"{block.attention!r}, {block.ffn!r}" for block in spec.blocks],
    }


def _stream() -> dict[str, str]:
    """A few words of the streams that all weights come from, as the files' own bytes."""
    found = {}
    for dtype in DTYPES:
        kind = dtype_named(dtype)
        words = np.empty(6, kind.word)
        philox.fill_words(words, kind, seed=1, name="golden", start=3, mean=1.0, std=0.2)
        found[dtype] = words.tobytes().hex(" ", kind.itemsize)
    return found


def _flags(spec: ModelSpec) -> str:
    """What Megatron-LM is to be started with, or that it cannot be."""
    try:
        return " ".join(megatron_lm_flags(spec))
    except BridgeError as error:
        return f"refused: {error.code}"


def _inv_freq(spec: ModelSpec) -> list[float]:
    from bridge import rotary  # not the function: a fault may have put another one there

    return [rounded(float(one)) for one in rotary.inv_freq(spec.rope, spec.kv_channels)]


def _rank_tensors(case: Case, bench: Bench, spec: ModelSpec) -> dict[str, list[str]] | None:
    """What each of two TP ranks holds; None where the model cannot be cut by two."""
    import torch

    from bridge.loading import fill

    if tensor_parallel_problems(spec, _TP):
        return None
    plan = Plan(spec, spec.padded_vocab_size(_TP))
    shards = {
        name: [parameter.shard(rank, _TP) for rank in range(_TP)]
        for name, parameter in plan.parameters.items()
    }
    if not case.model.startswith(PREFIX):
        return {
            name: [
                "; ".join(
                    f"{tile.source or 'zeros'}{tile.source_box} in {tile.target_box}"
                    for tile in tiling.tiles
                )
                for tiling in tilings
            ]
            for name, tilings in shards.items()
        }
    found = {}
    with SafetensorsSource(bench.checkpoint(case)) as source:
        for name, tilings in shards.items():
            held = [torch.empty(one.shape, dtype=getattr(torch, case.dtype)) for one in tilings]
            wanted = [(name, tensor, one) for tensor, one in zip(held, tilings, strict=True)]
            fill(wanted, source, plan.hf_shapes)
            found[name] = list(map(describe_tensor, held))
    return found


def _logits(case: Case, bench: Bench, probe: Probe) -> list[list[float]]:
    """(position, column), each rounded to what is recorded."""
    logits = bench.oracle_logits(case, probe)[0][:, columns_of(case, bench)]
    return [[rounded(float(one)) for one in row] for row in logits]


def rounded(number: float) -> float:
    """To as many digits as two machines agree on, and some to spare."""
    return float(f"{number:.{_DIGITS}g}")


def _plain(values: Mapping[str, Any]) -> dict[str, Json]:
    """As JSON gives it back, so that what is observed equals what was recorded."""
    found: dict[str, Json] = json.loads(json.dumps(values, default=_named))
    return found


def _named(value: object) -> str:
    if isinstance(value, Dtype):
        return value.name
    raise TypeError(f"{value!r} is no plain value")
