"""A live Megatron model is the model its spec and weights describe, at every layout.

Four real Megatron-Core ranks are started once, as the script model_ranks.py, and run every layout;
the tests then judge what they wrote. The truth is a float64 forward pass written here from the
architecture's description, with float32 RoPE angles; its float32 twin says how far from the truth
plain float32 arithmetic may be.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from bridge.activations import saved_by_stage
from bridge.errors import AccountingError, PlanError
from bridge.memory import rank_memory
from bridge.parameters import parameters
from bridge.spec import (
    GroupedQueryAttention,
    Linear,
    ModelSpec,
    NoOp,
    ParallelLayout,
    SwiGLU,
)
from bridge.workload import Workload

if TYPE_CHECKING:
    from tests.bridge import model_ranks as ranks
else:  # a script beside this file: tests are not a package
    sys.path.append(str(Path(__file__).parent))
    import model_ranks as ranks

RANKS = Path(__file__).with_name("model_ranks.py")

PIPELINES = {
    "llama-tp1-pp1": ("llama-tp1-pp2", "llama-tp1-pp2-vp2", "llama-tp1-pp4"),
    "llama-tp2-pp1": ("llama-tp2-pp2",),
    "tied-tp1-pp1": ("tied-tp1-pp2",),
    "tied-tp2-pp1": ("tied-tp2-pp2",),
    "decilm-tp1-pp1": ("decilm-tp1-pp2", "decilm-empty-stage", "decilm-uneven-vp"),
    "decilm-tp2-pp1": ("decilm-tp2-pp2", "decilm-tp2-pp2-vp2"),
    "no-linear-tp2-pp1-sp": ("no-linear-tp2-pp2-sp",),
}


def reference_logits(
    spec: ModelSpec,
    weights: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    position_ids: torch.Tensor | None,
) -> torch.Tensor:
    """The architecture, plainly: (batch, seq, vocab_size) in `dtype`."""
    w = {name: tensor.to(dtype) for name, tensor in weights.items()}
    length = ranks.INPUT_IDS.shape[1]
    positions = torch.arange(length) if position_ids is None else position_ids
    angles = positions.float()[..., None] * llama3_frequencies(spec)  # float32, by definition
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    if cos.dim() == 2:
        cos, sin = cos[None], sin[None]
    x = w["model.embed_tokens.weight"][ranks.INPUT_IDS]
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


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(  # noqa: S603 - our own script
        [sys.executable, str(RANKS), str(folder)],
        timeout=ranks.TIME_LIMIT + 30,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [
        torch.load(folder / f"rank-{rank}.pt", weights_only=False)
        for rank in range(ranks.WORLD_SIZE)
    ]


def pp_rank_of(rank: int, layout: ParallelLayout) -> int:
    """TP ranks are neighbours, replicas come next: Megatron's default order."""
    return rank // (ranks.WORLD_SIZE // layout.pipeline_model_parallel_size)


def rms(x: torch.Tensor) -> float:
    """Root mean square, in float64."""
    return float(x.double().square().mean().sqrt())


@pytest.mark.ranks
@pytest.mark.parametrize("probe", ranks.PROBES)
@pytest.mark.parametrize("case", ranks.LAYOUTS)
def test_megatron_is_as_close_to_float64_as_plain_float32_is(
    results: list[dict[str, Any]], case: str, probe: str
) -> None:
    """Logits of every layout err no more than twice as much as a plain float32 forward pass."""
    spec = ranks.SPECS[ranks.LAYOUTS[case][0]]
    weights = ranks.hf_weights(spec)
    truth = reference_logits(spec, weights, torch.float64, ranks.PROBES[probe])
    twin = reference_logits(spec, weights, torch.float32, ranks.PROBES[probe])
    logits = results[0][case]["logits"][probe]
    assert logits.shape == truth.shape
    assert logits.dtype == torch.float32
    assert rms(logits - truth) <= 2.0 * rms(twin - truth)


@pytest.mark.ranks
@pytest.mark.parametrize("case", ranks.LAYOUTS)
def test_every_rank_has_the_same_logits(results: list[dict[str, Any]], case: str) -> None:
    """Gathered over TP and broadcast over PP: bit-equal on all ranks."""
    for probe in ranks.PROBES:
        for rank in range(1, ranks.WORLD_SIZE):
            assert torch.equal(
                results[0][case]["logits"][probe], results[rank][case]["logits"][probe]
            )


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("whole", "cut"), [(one, other) for one, others in PIPELINES.items() for other in others]
)
def test_pipeline_stages_change_no_bit(results: list[dict[str, Any]], whole: str, cut: str) -> None:
    """Uneven, interleaved and empty stages give the logits of a single stage, bit for bit."""
    for probe in ranks.PROBES:
        assert torch.equal(results[0][whole]["logits"][probe], results[0][cut]["logits"][probe])


@pytest.mark.ranks
def test_transformers_llama_gives_the_same_logits(results: list[dict[str, Any]]) -> None:
    """Megatron errs no more than twice as much as LlamaForCausalLM, both against float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    scaling = ranks.LLAMA.rope.scaling
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
    weights = ranks.hf_weights(ranks.LLAMA)
    model.load_state_dict(weights, strict=True)
    for probe, positions in (("near", torch.arange(11)), ("far", ranks.FAR)):
        with torch.no_grad():
            theirs = model(
                ranks.INPUT_IDS,
                position_ids=positions[None].expand(2, -1),
                attention_mask=torch.ones(11, 11).tril()[None, None].log(),
            ).logits
        truth = reference_logits(ranks.LLAMA, weights, torch.float64, ranks.PROBES[probe])
        assert rms(results[0]["llama-tp1-pp1"]["logits"][probe] - truth) <= 2.0 * rms(
            theirs - truth
        )


@pytest.mark.ranks
def test_positions_reach_every_pipeline_stage(results: list[dict[str, Any]]) -> None:
    """Far positions change the logits on all layouts, and each row of a batch has its own."""
    for case in ranks.LAYOUTS:
        near, far, rows = (results[0][case]["logits"][probe] for probe in ranks.PROBES)
        assert rms(far - near) > 0.1 * rms(near)
        assert torch.equal(far[0], rows[0])
        assert rms(far[1] - rows[1]) > 0.1 * rms(far[1])


@pytest.mark.ranks
@pytest.mark.parametrize("case", ranks.LAYOUTS)
def test_each_rank_reads_only_its_own_slices(results: list[dict[str, Any]], case: str) -> None:
    """Each element held is read once, less the rows that only pad; a tied embedding is too."""
    model, layout = ranks.LAYOUTS[case]
    spec = ranks.SPECS[model]
    rows = spec.padded_vocab_size(layout.tensor_model_parallel_size, make_vocab_size_divisible_by=8)
    for one in results:
        assert one[case]["read_again"] == []
        for elements_read in one[case]["elements_read"].values():
            padding = one[case]["elements_held"] - elements_read
            assert 0 <= padding <= 2 * (rows - spec.vocab_size) * spec.hidden_size


@pytest.mark.ranks
@pytest.mark.parametrize("case", ranks.LAYOUTS)
def test_memory_counts_the_parameters_each_rank_has(
    results: list[dict[str, Any]], case: str
) -> None:
    """Weights to the element, whatever the layout: what Megatron's own modules add up to."""
    model, layout = ranks.LAYOUTS[case]
    counted = rank_memory(ranks.SPECS[model], layout, Workload(params_dtype="float32"))
    for rank, one in enumerate(results):
        memory = counted[pp_rank_of(rank, layout)]
        assert one[case]["parameters"] == memory.num_parameters
        assert 4 * one[case]["parameters"] == memory.weights


@pytest.mark.ranks
@pytest.mark.parametrize("case", ranks.LAYOUTS)
def test_activations_are_what_autograd_keeps(results: list[dict[str, Any]], case: str) -> None:
    """Local layers, to the byte: all but masks, which a rank has once, is in the estimate."""
    model, layout = ranks.LAYOUTS[case]
    spec = ranks.SPECS[model]
    batch, length = ranks.SAVED_IDS.shape
    work = Workload(
        purpose="training", sequence_length=length, micro_batch_size=batch,
        params_dtype="float32", layers="local",
    )  # fmt: skip
    for rank, one in enumerate(results):
        stages = layout.stages_of(pp_rank_of(rank, layout))
        layers = [layer_idx for stage in stages for layer_idx in stage.layers]
        causal = any(
            isinstance(spec.blocks[layer_idx].attention, GroupedQueryAttention)
            for layer_idx in layers
        )
        foreign_tokens = stages[0].pre_process and layout.tensor_model_parallel_size > 1
        masks = causal * length * length + foreign_tokens * batch * length
        estimate = sum(saved_by_stage(spec, layout, work, stage) for stage in stages)
        assert one[case]["bytes_saved"] == estimate + masks


@pytest.mark.ranks
@pytest.mark.parametrize("case", ranks.LAYOUTS)
def test_ranks_together_hold_the_table(results: list[dict[str, Any]], case: str) -> None:
    """Names on the ranks are the checkpoint's names, and none is missing."""
    spec = ranks.SPECS[ranks.LAYOUTS[case][0]]
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
        for rank in range(ranks.WORLD_SIZE)
        if "embedding.word_embeddings.weight"
        in [name for name, _ in results[rank]["tied-tp2-pp2"]["names"]]
    ]
    assert holders == [0, 1, 2, 3]
    assert ("embedding.word_embeddings.weight", "output_layer.weight") in results[3][
        "tied-tp2-pp2"
    ]["names"]


@pytest.mark.ranks
@pytest.mark.parametrize("case", ranks.LAYOUTS)
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
        weights = {
            name: one.to(dtype).requires_grad_()
            for name, one in ranks.hf_weights(ranks.DECILM).items()
        }
        reference_logits(ranks.DECILM, weights, dtype, ranks.FAR).square().mean().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        grads[dtype] = {name: one.grad for name, one in weights.items() if one.grad is not None}
    table = parameters(
        ranks.DECILM,
        padded_vocab_size=ranks.DECILM.padded_vocab_size(2, make_vocab_size_divisible_by=8),
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
    assert torch.equal(llama3_frequencies(ranks.DECILM), found["frequencies"])
    assert torch.equal(
        ranks.hf_weights(ranks.DECILM)["model.norm.weight"].bfloat16(), found["final_norm"]
    )
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
