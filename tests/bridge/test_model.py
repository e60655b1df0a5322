"""A live Megatron model is the model its spec and weights describe, at every layout.

Four real Megatron-Core ranks are started once, as a script of this very file, and run every layout;
the tests then judge what they wrote. The truth is a float64 forward pass written here from the
architecture's description, with float32 RoPE angles; its float32 twin says how far from the truth
plain float32 arithmetic may be.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import torch

from bridge import platform
from bridge.dtypes import Words, dtype_named
from bridge.errors import AccountingError, BridgeError, PlanError
from bridge.model import build_model, forward, load_hf, load_megatron, local_parameters
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
PIPELINES = {
    "llama-tp1-pp1": ("llama-tp1-pp2", "llama-tp1-pp2-vp2", "llama-tp1-pp4"),
    "llama-tp2-pp1": ("llama-tp2-pp2",),
    "tied-tp1-pp1": ("tied-tp1-pp2",),
    "tied-tp2-pp1": ("tied-tp2-pp2",),
    "decilm-tp1-pp1": ("decilm-tp1-pp2", "decilm-empty-stage", "decilm-uneven-vp"),
    "decilm-tp2-pp1": ("decilm-tp2-pp2", "decilm-tp2-pp2-vp2"),
    "no-linear-tp2-pp1-sp": ("no-linear-tp2-pp2-sp",),
}

INPUT_IDS = torch.randint(0, 125, (2, 11), generator=torch.Generator().manual_seed(3))
FAR = torch.tensor([0, 1, 7, 500, 4096, 8191, 8192, 40000, 99999, 131070, 131071])
PROBES = {"near": None, "far": FAR, "rows": torch.stack([FAR, FAR.flip(0)])}


class DictSource:
    """A TensorSource over torch tensors in memory that remembers how much was read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._words: dict[str, Words] = {}
        self._infos: dict[str, TensorInfo] = {}
        self.elements_read = 0
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
        self.elements_read += box.volume

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


# The truth ------------------------------------------------------------------------------------


def reference_logits(
    spec: ModelSpec,
    weights: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    position_ids: torch.Tensor | None,
) -> torch.Tensor:
    """The architecture, plainly: (batch, seq, vocab_size) in `dtype`."""
    w = {name: tensor.to(dtype) for name, tensor in weights.items()}
    length = INPUT_IDS.shape[1]
    positions = torch.arange(length) if position_ids is None else position_ids
    angles = positions.float()[..., None] * llama3_frequencies(spec)  # float32, by definition
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    if cos.dim() == 2:
        cos, sin = cos[None], sin[None]
    x = w["model.embed_tokens.weight"][INPUT_IDS]
    mask = torch.full((length, length), -torch.inf, dtype=dtype).triu(1)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + spec.layernorm_epsilon)
        return x * scale * w[name]

    def heads(x: torch.Tensor, name: str) -> torch.Tensor:
        y = x @ w[name].T
        return y.view(*y.shape[:2], -1, spec.kv_channels).transpose(1, 2)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        c, s = cos[:, None], sin[:, None]
        return torch.cat((a * c - b * s, b * c + a * s), dim=-1)

    for layer_idx, block in enumerate(spec.blocks):
        layer = f"model.layers.{layer_idx}."
        match block.attention:
            case GroupedQueryAttention(num_query_groups=groups):
                y = norm(x, layer + "input_layernorm.weight")
                q = rotate(heads(y, layer + "self_attn.q_proj.weight"))
                k = rotate(heads(y, layer + "self_attn.k_proj.weight"))
                v = heads(y, layer + "self_attn.v_proj.weight")
                share = spec.num_attention_heads // groups
                k, v = (one.repeat_interleave(share, dim=1) for one in (k, v))
                scores = q @ k.transpose(2, 3) / math.sqrt(spec.kv_channels) + mask
                mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
                x = x + mixed @ w[layer + "self_attn.o_proj.weight"].T
            case Linear():
                y = norm(x, layer + "input_layernorm.weight")
                x = x + y @ w[layer + "self_attn.linear_attn.weight"].T
            case NoOp():
                pass
        match block.ffn:
            case SwiGLU():
                y = norm(x, layer + "post_attention_layernorm.weight")
                gate = torch.nn.functional.silu(y @ w[layer + "mlp.gate_proj.weight"].T)
                up = y @ w[layer + "mlp.up_proj.weight"].T
                x = x + (gate * up) @ w[layer + "mlp.down_proj.weight"].T
            case Linear():
                y = norm(x, layer + "post_attention_layernorm.weight")
                x = x + y @ w[layer + "mlp.linear_mlp.weight"].T
            case NoOp():
                pass
    x = norm(x, "model.norm.weight")
    tied = spec.share_embeddings_and_output_weights
    return x @ w["model.embed_tokens.weight" if tied else "lm_head.weight"].T


def llama3_frequencies(spec: ModelSpec) -> torch.Tensor:
    """Take the frequencies from transformers itself."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = spec.rope.scaling
    assert scaling is not None
    config = LlamaConfig(
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.num_attention_heads,
        head_dim=spec.kv_channels,
        max_position_embeddings=spec.max_position_embeddings,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": spec.rope.rotary_base,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        },
    )
    frequencies: torch.Tensor = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")[0]
    return frequencies


# The ranks ------------------------------------------------------------------------------------


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
    again = build_model(spec, layout, params_dtype="float32")
    # Padded for another TP than any layout here.
    load_megatron(again, spec, layout, DictSource(megatron_weights(spec, 168)))
    return {
        "logits": logits,
        "names": [(name, live) for name, live, _ in held],
        "elements_held": sum(tensor.numel() for *_, tensor in held),
        "elements_read": source.elements_read,
        "megatron_equals_hf": all(
            torch.equal(one.tensor, tensor)
            for one, (*_, tensor) in zip(local_parameters(again, layout), held, strict=True)
        ),
    }


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


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(  # noqa: S603 - our own file
        [sys.executable, __file__, str(folder)],
        timeout=TIME_LIMIT + 30,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [
        torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(WORLD_SIZE)
    ]


# The tests ------------------------------------------------------------------------------------


def rms(x: torch.Tensor) -> float:
    """Root mean square, in float64."""
    return float(x.double().square().mean().sqrt())


@pytest.mark.ranks
@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("case", LAYOUTS)
def test_megatron_is_as_close_to_float64_as_plain_float32_is(
    results: list[dict[str, Any]], case: str, probe: str
) -> None:
    """Logits of every layout err no more than twice as much as a plain float32 forward pass."""
    spec = SPECS[LAYOUTS[case][0]]
    weights = hf_weights(spec)
    truth = reference_logits(spec, weights, torch.float64, PROBES[probe])
    twin = reference_logits(spec, weights, torch.float32, PROBES[probe])
    logits = results[0][case]["logits"][probe]
    assert logits.shape == truth.shape
    assert logits.dtype == torch.float32
    assert rms(logits - truth) <= 2.0 * rms(twin - truth)


@pytest.mark.ranks
@pytest.mark.parametrize("case", LAYOUTS)
def test_every_rank_has_the_same_logits(results: list[dict[str, Any]], case: str) -> None:
    """Gathered over TP and broadcast over PP: bit-equal on all ranks."""
    for probe in PROBES:
        for rank in range(1, WORLD_SIZE):
            assert torch.equal(
                results[0][case]["logits"][probe], results[rank][case]["logits"][probe]
            )


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("whole", "cut"), [(one, other) for one, others in PIPELINES.items() for other in others]
)
def test_pipeline_stages_change_no_bit(results: list[dict[str, Any]], whole: str, cut: str) -> None:
    """Uneven, interleaved and empty stages give the logits of a single stage, bit for bit."""
    for probe in PROBES:
        assert torch.equal(results[0][whole]["logits"][probe], results[0][cut]["logits"][probe])


@pytest.mark.ranks
def test_transformers_llama_gives_the_same_logits(results: list[dict[str, Any]]) -> None:
    """Megatron errs no more than twice as much as LlamaForCausalLM, both against float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    scaling = LLAMA.rope.scaling
    assert scaling is not None
    config = LlamaConfig(
        hidden_size=40,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=6,
        intermediate_size=56,
        num_hidden_layers=4,
        vocab_size=131,
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        attn_implementation="eager",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    model = LlamaForCausalLM(config).eval()
    weights = hf_weights(LLAMA)
    model.load_state_dict(weights, strict=True)
    for probe, positions in (("near", torch.arange(11)), ("far", FAR)):
        with torch.no_grad():
            theirs = model(
                INPUT_IDS,
                position_ids=positions[None].expand(2, -1),
                attention_mask=torch.ones(11, 11).tril()[None, None].log(),
            ).logits
        truth = reference_logits(LLAMA, weights, torch.float64, PROBES[probe])
        assert rms(results[0]["llama-tp1-pp1"]["logits"][probe] - truth) <= 2.0 * rms(
            theirs - truth
        )


@pytest.mark.ranks
def test_positions_reach_every_pipeline_stage(results: list[dict[str, Any]]) -> None:
    """Far positions change the logits on all layouts, and each row of a batch has its own."""
    for case in LAYOUTS:
        near, far, rows = (results[0][case]["logits"][probe] for probe in PROBES)
        assert rms(far - near) > 0.1 * rms(near)
        assert torch.equal(far[0], rows[0])
        assert rms(far[1] - rows[1]) > 0.1 * rms(far[1])


@pytest.mark.ranks
@pytest.mark.parametrize("case", LAYOUTS)
def test_each_rank_reads_only_its_own_slices(results: list[dict[str, Any]], case: str) -> None:
    """Elements read are the elements held, less the rows that only pad the vocabulary."""
    model, layout = LAYOUTS[case]
    spec = SPECS[model]
    rows = spec.padded_vocab_size(layout.tensor_model_parallel_size, make_vocab_size_divisible_by=8)
    for one in results:
        padding = one[case]["elements_held"] - one[case]["elements_read"]
        assert 0 <= padding <= 2 * (rows - spec.vocab_size) * spec.hidden_size


@pytest.mark.ranks
@pytest.mark.parametrize("case", LAYOUTS)
def test_ranks_together_hold_the_table(results: list[dict[str, Any]], case: str) -> None:
    """Names on the ranks are the checkpoint's names, and none is missing."""
    spec = SPECS[LAYOUTS[case][0]]
    held = {name for one in results for name, _ in one[case]["names"]}
    assert held == set(parameters(spec, padded_vocab_size=spec.vocab_size))


@pytest.mark.ranks
def test_live_names_become_names_of_the_checkpoint(results: list[dict[str, Any]]) -> None:
    """Norms move into the linear that consumes them, layers count over the whole model."""
    names = {live: name for name, live in results[2]["decilm-empty-stage"]["names"]}
    assert names["decoder.layers.0.input_layernorm.weight"] == (
        "decoder.layers.4.self_attention.layer_norm_weight"
    )
    assert names["decoder.layers.0.pre_mlp_layernorm.weight"] == (
        "decoder.layers.4.mlp.layer_norm_weight"
    )
    assert names["decoder.layers.0.mlp.weight"] == "decoder.layers.4.mlp.weight"
    assert names["decoder.layers.1.input_layernorm.weight"] == (
        "decoder.layers.5.self_attention.linear_qkv.layer_norm_weight"
    )
    assert names["decoder.layers.1.pre_mlp_layernorm.weight"] == (
        "decoder.layers.5.mlp.linear_fc1.layer_norm_weight"
    )
    assert results[1]["decilm-empty-stage"]["names"] == []
    assert [name for name, _ in results[3]["decilm-empty-stage"]["names"]] == [
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]


@pytest.mark.ranks
def test_both_copies_of_a_tied_embedding_are_filled(results: list[dict[str, Any]]) -> None:
    """With PP the first and the last stage each hold the embedding, under its one name."""
    holders = [
        rank
        for rank in range(WORLD_SIZE)
        if "embedding.word_embeddings.weight"
        in [name for name, _ in results[rank]["tied-tp2-pp2"]["names"]]
    ]
    assert holders == [0, 1, 2, 3]
    assert ("embedding.word_embeddings.weight", "output_layer.weight") in results[3][
        "tied-tp2-pp2"
    ]["names"]


@pytest.mark.ranks
@pytest.mark.parametrize("case", LAYOUTS)
def test_a_megatron_checkpoint_fills_the_same_bits(
    results: list[dict[str, Any]], case: str
) -> None:
    """Whole Megatron tensors, padded for another TP, load to exactly what the HF files load to."""
    assert all(one[case]["megatron_equals_hf"] for one in results)


@pytest.mark.ranks
def test_gradients_are_those_of_the_reference(results: list[dict[str, Any]]) -> None:
    """At TP=2 each rank's gradient is its shard of the reference's, to float32 accuracy."""
    grads: dict[torch.dtype, dict[str, torch.Tensor]] = {}
    for dtype in (torch.float64, torch.float32):
        weights = {name: one.to(dtype).requires_grad_() for name, one in hf_weights(DECILM).items()}
        reference_logits(DECILM, weights, dtype, FAR).square().mean().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        grads[dtype] = {name: one.grad for name, one in weights.items() if one.grad is not None}
    table = parameters(
        DECILM, padded_vocab_size=DECILM.padded_vocab_size(2, make_vocab_size_divisible_by=8)
    )
    for rank in (0, 1):
        assert results[rank]["gradients"].keys() == table.keys()
        for name, ours in results[rank]["gradients"].items():
            shard = table[name].shard(rank, 2)
            truth, twin = torch.zeros(shard.shape).double(), torch.zeros(shard.shape)
            for tile in shard.tiles:
                if tile.source is not None:
                    for whole, dtype in ((truth, torch.float64), (twin, torch.float32)):
                        piece = grads[dtype][tile.source][tile.source_box.slices]
                        whole[tile.target_box.slices] = piece
            floor = 1e-7 * rms(truth)
            assert rms(ours - truth) <= 3.0 * max(rms(twin - truth), floor), name


@pytest.mark.ranks
def test_bfloat16_models_keep_float32_frequencies(results: list[dict[str, Any]]) -> None:
    """Weights and logits are bfloat16, each weight rounded once, `inv_freq` is not rounded."""
    found = results[0]["bfloat16"]
    assert found["dtypes"] == {torch.bfloat16}
    assert torch.equal(llama3_frequencies(DECILM), found["frequencies"])
    assert torch.equal(hf_weights(DECILM)["model.norm.weight"].bfloat16(), found["final_norm"])
    assert torch.isfinite(found["logits"]).all()


@pytest.mark.ranks
def test_loading_refuses_what_does_not_add_up(results: list[dict[str, Any]]) -> None:
    """Missing, mis-shaped and unaccounted parameters are named, all of a kind in one error."""
    found = results[0]["refusals"]
    assert isinstance(found["missing"], AccountingError)
    assert list(found["missing"].where) == [
        f"model.layers.5.mlp.{name}_proj.weight: missing" for name in ("down", "gate", "up")
    ]
    assert isinstance(found["wide"], AccountingError)
    assert list(found["wide"].where) == [
        "model.layers.0.mlp.up_proj.weight: shape (65, 40), the model's is (64, 40)"
    ]
    assert isinstance(found["extra live"], PlanError)
    assert list(found["extra live"].where) == [
        "decoder.layers.2.bias: a live parameter too many (vp_stage 0)"
    ]
    assert isinstance(found["lost live"], PlanError)
    lost = "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    assert list(found["lost live"].where) == [f"{lost}: no live parameter (vp_stage 0)"]


if __name__ == "__main__":
    run_ranks(Path(sys.argv[1]))
