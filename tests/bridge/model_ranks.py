"""Four Megatron-Core ranks that build, fill and run toy models at every layout.

Run as `model_ranks.py DIRECTORY`; each rank leaves what it saw in DIRECTORY/rank-N.pt. A script and
not a test: ranks are forked from it, so that Megatron is imported once. test_model.py judges.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from bridge import platform
from bridge.dtypes import Words, dtype_named
from bridge.errors import BridgeError
from bridge.forward import forward, run_stages
from bridge.live_parameters import load_hf, load_megatron, local_parameters
from bridge.model import build_model
from bridge.parameters import hf_tensors, parameters
from bridge.pipeline import parse_layout
from bridge.spec import (
    BlockSpec,
    GroupedQueryAttention,
    Linear,
    Llama3Scaling,
    ModelSpec,
    NoOp,
    ParallelLayout,
    RopeSpec,
    SwiGLU,
)
from bridge.storage.source import TensorInfo
from bridge.tiling import Box

WORLD_SIZE = 4
TIME_LIMIT = 240

LLAMA = ModelSpec(
    hidden_size=40,
    num_attention_heads=8,
    kv_channels=6,
    vocab_size=131,
    max_position_embeddings=131072,
    layernorm_epsilon=1e-5,
    rope=RopeSpec(
        rotary_base=500000.0,
        scaling=Llama3Scaling(
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
    share_embeddings_and_output_weights=False,
    params_dtype="float32",
    blocks=(
        BlockSpec(
            attention=GroupedQueryAttention(num_query_groups=2), ffn=SwiGLU(ffn_hidden_size=56)
        ),
    )
    * 4,
    heterogeneous_block_specs=False,
)
TIED = dataclasses.replace(
    LLAMA, share_embeddings_and_output_weights=True, blocks=LLAMA.blocks[:3], vocab_size=125
)
DECILM = dataclasses.replace(
    LLAMA,
    heterogeneous_block_specs=True,
    rope=RopeSpec(
        rotary_base=500000.0,
        # Values that Megatron has no arguments for.
        scaling=Llama3Scaling(
            factor=16.0,
            low_freq_factor=2.0,
            high_freq_factor=16.0,
            original_max_position_embeddings=4096,
        ),
    ),
    blocks=(
        BlockSpec(attention=NoOp(), ffn=SwiGLU(ffn_hidden_size=64)),
        BlockSpec(attention=GroupedQueryAttention(num_query_groups=4), ffn=Linear()),
        BlockSpec(attention=NoOp(), ffn=NoOp()),
        BlockSpec(attention=NoOp(), ffn=NoOp()),
        BlockSpec(attention=Linear(), ffn=Linear()),
        BlockSpec(
            attention=GroupedQueryAttention(num_query_groups=2), ffn=SwiGLU(ffn_hidden_size=24)
        ),
        BlockSpec(attention=GroupedQueryAttention(num_query_groups=8), ffn=NoOp()),
    ),
)
NO_LINEAR = dataclasses.replace(
    DECILM,
    blocks=tuple(block for block in DECILM.blocks if Linear() not in (block.attention, block.ffn)),
)
SPECS = {"llama": LLAMA, "tied": TIED, "decilm": DECILM, "no-linear": NO_LINEAR}


def _stages(pp: int, counts: Sequence[int], vpp: int | None = None) -> ParallelLayout:
    return ParallelLayout(
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        num_layers_per_stage=tuple(counts),
        make_vocab_size_divisible_by=8,
    )


def _layouts() -> dict[str, tuple[str, ParallelLayout]]:
    found = {}
    for model, names in {
        "llama": "tp1-pp1 tp2-pp1 tp4-pp1 tp1-pp2 tp2-pp2 tp1-pp2-vp2 tp2-pp1-sp tp1-pp4",
        "tied": "tp1-pp1 tp2-pp1 tp1-pp2 tp2-pp2 tp2-pp2-sp",
        "decilm": "tp1-pp1 tp2-pp1 tp4-pp1 tp1-pp2 tp2-pp2 tp2-pp2-vp2",
        "no-linear": "tp2-pp1 tp2-pp1-sp tp2-pp2-sp tp4-pp1-sp",
    }.items():
        for name in names.split():
            layout = parse_layout(name, SPECS[model], make_vocab_size_divisible_by=8)
            found[f"{model}-{name}"] = (model, layout)
    # Stage 1 holds nothing but no-ops: not a single parameter. Stage 3 has no layer at all.
    found["decilm-empty-stage"] = ("decilm", _stages(4, (2, 2, 3, 0)))
    found["decilm-uneven-vp"] = ("decilm", _stages(2, (1, 1, 1, 1, 1, 2), vpp=3))
    return found


LAYOUTS = _layouts()
INPUT_IDS = torch.randint(0, 125, (2, 11), generator=torch.Generator().manual_seed(3))
SAVED_IDS = torch.randint(0, 125, (2, 48), generator=torch.Generator().manual_seed(5))
FAR = torch.tensor([0, 1, 7, 500, 4096, 8191, 8192, 40000, 99999, 131070, 131071])
PROBES = {"near": None, "far": FAR, "rows": torch.stack([FAR, FAR.flip(0)])}


class DictSource:
    """A TensorSource over torch tensors in memory that counts how often each element was read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._words: dict[str, Words] = {}
        self._infos: dict[str, TensorInfo] = {}
        self.times_read = {
            name: torch.zeros(tensor.shape, dtype=torch.int32) for name, tensor in tensors.items()
        }
        self._lock = threading.Lock()
        for name, tensor in tensors.items():
            dtype = dtype_named(str(tensor.dtype))
            signed = tensor.contiguous().view(getattr(torch, f"int{8 * dtype.itemsize}")).numpy()
            self._words[name] = signed.view(dtype.word)
            self._infos[name] = TensorInfo(shape=tuple(tensor.shape), dtype=dtype)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Everything the source holds."""
        return self._infos

    def read_into(self, name: str, box: Box, out: Words) -> None:
        """Copy a box."""
        out[...] = self._words[name][box.slices]
        with self._lock:
            self.times_read[name][box.slices] += 1

    @property
    def elements_read(self) -> int:
        """Elements that were read, each as often as it was."""
        return sum(int(one.sum()) for one in self.times_read.values())

    @property
    def read_again(self) -> list[str]:
        """Tensors of which some element was read twice or more."""
        return [name for name, one in self.times_read.items() if int(one.max()) > 1]

    def close(self) -> None:
        """Nothing to release."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def hf_weights(spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Weights large enough for mistakes to show: std 1/sqrt(fan_in), norms far from 1."""
    generator = torch.Generator().manual_seed(17)
    found = {}
    for name, shape in hf_tensors(spec).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            found[name] = 1 + 0.3 * noise
        elif name == "model.embed_tokens.weight":
            found[name] = noise
        else:
            found[name] = noise / math.sqrt(shape[1])
    return found


def megatron_weights(spec: ModelSpec, rows: int) -> dict[str, torch.Tensor]:
    """The same model under Megatron's names, placed element by element."""
    hf = hf_weights(spec)
    found = {}
    for name, parameter in parameters(spec, padded_vocab_size=rows).items():
        whole = torch.full(parameter.shape, -7.0)  # padding that must never be looked at
        for tile in parameter.tiling.tiles:
            if tile.source is not None:
                whole[tile.target_box.slices] = hf[tile.source][tile.source_box.slices]
        found[name] = whole
    return found


def run_ranks(folder: Path) -> None:
    """Start the ranks, forked from here so that Megatron is imported once, and wait."""
    import megatron.core.models.gpt
    import megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs  # noqa: F401

    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(r, folder)) for r in range(WORLD_SIZE)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(TIME_LIMIT)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    sys.exit(0 if codes == [0] * WORLD_SIZE else 1)


def run_rank(rank: int, folder: Path) -> None:
    """Every layout, then the cases that need one of them, in the same process."""
    results: dict[str, Any] = {}
    for case, (model, layout) in LAYOUTS.items():
        _join(rank, folder, case, layout)
        try:
            results[case] = _run_layout(SPECS[model], layout)
        finally:
            platform.finalize()
    layout = LAYOUTS["decilm-tp2-pp1"][1]
    _join(rank, folder, "others", layout)
    try:
        results["gradients"] = _gradients(DECILM, layout)
        results["bfloat16"] = _bfloat16(DECILM, layout)
        results["refusals"] = _refusals(DECILM, layout)
    finally:
        platform.finalize()
    torch.save(results, folder / f"rank-{rank}.pt")


def _join(rank: int, folder: Path, case: str, layout: ParallelLayout) -> None:
    platform.initialize(
        rank,
        WORLD_SIZE,
        layout,
        init_method=f"file://{folder}/{case}",
        timeout=timedelta(seconds=60),
    )


def _run_layout(spec: ModelSpec, layout: ParallelLayout) -> dict[str, Any]:
    parts = build_model(spec, layout, params_dtype="float32")
    for part in parts:
        for parameter in part.parameters():
            parameter.data.fill_(torch.nan)
    source = DictSource(hf_weights(spec))
    load_hf(parts, spec, layout, source)
    logits = {
        probe: forward(parts, spec, layout, INPUT_IDS, positions)
        for probe, positions in PROBES.items()
    }
    held = [(one.name, one.live_name, one.tensor) for one in local_parameters(parts, layout)]
    saved = _bytes_saved(parts, spec, layout)
    again = build_model(spec, layout, params_dtype="float32")
    # Padded for another TP than any layout here.
    megatron = DictSource(megatron_weights(spec, 168))
    load_megatron(again, spec, layout, megatron)
    return {
        "logits": logits,
        "names": [(name, live) for name, live, _ in held],
        "parameters": sum(one.numel() for part in parts for one in part.parameters()),
        "bytes_saved": saved,
        "elements_held": sum(tensor.numel() for *_, tensor in held),
        "elements_read": {"hf": source.elements_read, "megatron": megatron.elements_read},
        "read_again": source.read_again + megatron.read_again,
        "megatron_equals_hf": all(
            torch.equal(one.tensor, tensor)
            for one, (*_, tensor) in zip(local_parameters(again, layout), held, strict=True)
        ),
    }


def _bytes_saved(parts: Sequence[Any], spec: ModelSpec, layout: ParallelLayout) -> int:
    """What autograd keeps of one batch and its loss on this rank: storages, each once."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    theirs = {one.untyped_storage().data_ptr() for part in parts for one in part.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in theirs:
            kept[tensor.untyped_storage().data_ptr()] = (
                tensor  # held, so that no other gets its place
            )
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        done = run_stages(parts, spec, layout, SAVED_IDS, None, grad=True)
        if done.logits is not None:
            vocab_parallel_cross_entropy(done.runs[-1].output, SAVED_IDS)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _gradients(spec: ModelSpec, layout: ParallelLayout) -> dict[str, Any]:
    parts = build_model(spec, layout, params_dtype="float32")
    load_hf(parts, spec, layout, DictSource(hf_weights(spec)))
    forward(parts, spec, layout, INPUT_IDS, FAR, grad=True).square().mean().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return {one.name: one.tensor.grad for one in local_parameters(parts, layout)}


def _bfloat16(spec: ModelSpec, layout: ParallelLayout) -> dict[str, Any]:
    parts = build_model(spec, layout, params_dtype="bfloat16")
    load_hf(parts, spec, layout, DictSource(hf_weights(spec)))
    held = {one.name: one.tensor for one in local_parameters(parts, layout)}
    logits = forward(parts, spec, layout, INPUT_IDS, FAR)
    return {
        "dtypes": {tensor.dtype for tensor in held.values()} | {logits.dtype},
        "frequencies": parts[0].rotary_pos_emb.inv_freq,
        "final_norm": held["decoder.final_layernorm.weight"].data,
        "logits": logits,
    }


def _refusals(spec: ModelSpec, layout: ParallelLayout) -> dict[str, BridgeError | None]:
    def refusal(weights: Mapping[str, torch.Tensor]) -> BridgeError | None:
        try:
            load_hf(parts, spec, layout, DictSource(weights))
        except BridgeError as error:
            return error
        return None

    parts = build_model(spec, layout, params_dtype="float32")
    weights = hf_weights(spec)
    missing = {name: one for name, one in weights.items() if "layers.5.mlp" not in name}
    wide = weights | {"model.layers.0.mlp.up_proj.weight": torch.zeros(65, 40)}
    found = {"missing": refusal(missing), "wide": refusal(wide)}
    parts[0].decoder.layers[2].register_parameter("bias", torch.nn.Parameter(torch.zeros(3)))
    found["extra live"] = refusal(weights)
    del parts[0].decoder.layers[2]._parameters["bias"]
    del parts[0].decoder.layers[1].input_layernorm._parameters["weight"]
    found["lost live"] = refusal(weights)
    return found


if __name__ == "__main__":
    run_ranks(Path(sys.argv[1]))
