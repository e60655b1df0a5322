"""Placement: every element of every rank is the one that Megatron reads there.

A round trip cannot see a wrong layout: any permutation undoes itself. So real ranks load tensors
whose elements say where they come from, once straight from Hugging Face's and once through a
torch_dist, and every row is held against the layout written out by hand below. That layout is from
Megatron-Core's own forward pass and shares nothing with the bridge's table.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import numpy as np

from harness import live, oracle
from harness.bench import Bench
from harness.coded import CodedSource, Codes, Codes32, codes_of
from harness.compare import Finding, exact, first_difference, words_of
from harness.live import LiveTensor, ModelRequest, summed
from harness.ranks import RankContext
from harness.suite import Case

_LAYER: Final = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_NOT_STORED: Final = Path()
_MAX_STORED: Final = 1 << 30
"""Elements up to which the way through a torch_dist is checked with coded tensors too."""

Expected = list[tuple[str | None, int]]
"""Per row of a rank's tensor: the HF tensor and its row; None where Megatron pads with zeros."""
# Alone before local layers; Transformer Engine's linears hold theirs, replacements as well.
_ATTENTION_NORMS: Final = (
    "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.layer_norm_weight",
)
_FFN_NORMS: Final = (
    "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.layer_norm_weight",
)


def run(case: Case, bench: Bench) -> Finding:
    """Load coded tensors on the ranks of the case's layout and look at every element."""
    codes = codes_of(bench.checkpoint(case))
    stored = sum(codes.sizes()) <= _MAX_STORED
    request = ModelRequest(
        spec=bench.spec(case),
        layout=bench.layout(case),
        params_dtype="float32",
        kind="megatron",
        path=bench.coded_megatron(case) if stored else _NOT_STORED,
        device="cuda" if case.device == "cuda" else "cpu",
        layers=case.layers,
        variant=bench.fault.name,
    )
    config = bench.config(case)
    ranks = bench.run(case, request.layout, look, request, codes, config)
    problems, compared = summed(ranks)
    return exact(
        problems,
        compared=compared,
        what="elements on real ranks" + ("" if stored else ", Hugging Face side only"),
    )


def look(
    _context: RankContext, request: ModelRequest, codes: Codes, config: dict[str, Any]
) -> tuple[list[str], int]:
    """Load and compare, on one rank.

    Returns:
        Every wrong tensor in words, and how many elements were looked at.
    """
    from megatron.core import parallel_state

    from bridge.live_parameters import load_hf

    model = oracle.read_config(config)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    tp = parallel_state.get_tensor_model_parallel_world_size()
    parts = live.build(request)
    problems, compared = [], 0
    for way in ("from Hugging Face", "from torch_dist")[: 1 if request.path == _NOT_STORED else 2]:
        for part in parts:
            for parameter in part.parameters():
                parameter.data.fill_(float("nan"))
        if way == "from Hugging Face":
            with CodedSource(codes) as source:
                load_hf(parts, request.spec, request.layout, source)
        else:
            live.fill(parts, request)
        for one in live.live_tensors(parts):
            found = _wrong(one, codes, model, tp_rank, tp)
            if found is not None:
                problems.append(f"{way}, tp rank {tp_rank} pp rank {pp_rank}: {found}")
            compared += one.tensor.numel()
    return problems, compared


def _wrong(
    one: LiveTensor, codes: Codes, model: oracle.Architecture, tp_rank: int, tp: int
) -> str | None:
    """Say how a rank's tensor differs from the layout, None when it does not."""
    actual = words_of(one.tensor)
    rows, columns = expected_rows(one.name, actual.shape, model, tp_rank, tp)
    if len(rows) != actual.shape[0]:
        return f"{one.name} has {actual.shape[0]} rows, Megatron reads {len(rows)}"
    wanted = _codes(codes, rows, columns)
    if wanted.shape != actual.shape:
        return f"{one.name} has shape {actual.shape}, Megatron reads {wanted.shape}"
    found = first_difference(actual, wanted)
    if found is None:
        return None
    index, count = found
    different = (actual != wanted).reshape(len(rows), -1).any(axis=1)
    first, last = np.flatnonzero(different)[[0, -1]].tolist()
    return (
        f"{one.name}{list(index)} holds {codes.say(int(actual[index]))}, Megatron reads "
        f"{codes.say(int(wanted[index]))} there; {count} elements wrong, in rows {first}-{last}"
    )


def _codes(codes: Codes, rows: Expected, columns: range | None) -> Codes32:
    width = () if columns is None else (len(columns),)
    wanted = np.zeros((len(rows), *width), np.uint32)
    start = 0
    while start < len(rows):  # runs of rows of one tensor at a time
        stop = start
        while stop < len(rows) and rows[stop][0] == rows[start][0]:
            stop += 1
        name = rows[start][0]
        if name is not None:
            numbers = np.array([row for _, row in rows[start:stop]])
            wanted[start:stop] = codes.of(name, numbers, columns)
        start = stop
    return wanted


# --------------------------------------------------------------------------------------
# The layout, by hand
# --------------------------------------------------------------------------------------


def expected_rows(
    name: str, shape: tuple[int, ...], model: oracle.Architecture, tp_rank: int, tp: int
) -> tuple[Expected, range | None]:
    """What each row of a rank's tensor must be, and which columns of it.

    Args:
        name: The live parameter, with the layer's index over the whole model.
        shape: Of the rank's tensor; only the padding of the vocabulary is taken from it.
        model: The architecture.
        tp_rank: This rank's.
        tp: Number of ranks that share each tensor.
    """
    everything = range(model.hidden_size)
    match = _LAYER.fullmatch(name)
    if match is None:
        if name == "decoder.final_layernorm.weight":
            return [("model.norm.weight", row) for row in everything], None
        table = {
            "embedding.word_embeddings.weight": "model.embed_tokens.weight",
            "output_layer.weight": "model.embed_tokens.weight" if model.tied else "lm_head.weight",
        }[name]
        # Each rank looks after a contiguous range of the padded vocabulary.
        first = tp_rank * shape[0]
        tokens = range(first, first + shape[0])
        return [
            (table, token) if token < model.vocab_size else (None, 0) for token in tokens
        ], everything
    layer_idx, leaf = int(match[1]), match[2]
    layer = f"model.layers.{layer_idx}"
    attention, ffn = model.blocks[layer_idx]
    if leaf in _ATTENTION_NORMS:
        return [(f"{layer}.input_layernorm.weight", row) for row in everything], None
    if leaf in _FFN_NORMS:
        return [(f"{layer}.post_attention_layernorm.weight", row) for row in everything], None
    share = range(tp_rank * model.hidden_size // tp, (tp_rank + 1) * model.hidden_size // tp)
    if leaf == "self_attention.weight":
        # ColumnParallelLinearGathered: outputs are dealt out, then gathered.
        return [(f"{layer}.self_attn.linear_attn.weight", row) for row in share], everything
    if leaf == "mlp.weight":
        return [(f"{layer}.mlp.linear_mlp.weight", row) for row in share], everything
    if leaf.startswith("self_attention.linear_") and isinstance(attention, oracle.Attention):
        return _attention(f"{layer}.self_attn", leaf, model, attention, tp_rank, tp)
    if leaf.startswith("mlp.linear_") and isinstance(ffn, oracle.Mlp):
        return _ffn(f"{layer}.mlp", leaf, model, ffn.ffn_hidden_size, tp_rank, tp)
    return [], None  # a parameter that the architecture does not have: no row can be right


def _attention(
    prefix: str,
    leaf: str,
    model: oracle.Architecture,
    attention: oracle.Attention,
    tp_rank: int,
    tp: int,
) -> tuple[Expected, range | None]:
    heads, channels = model.num_attention_heads, model.kv_channels
    if leaf == "self_attention.linear_proj.weight":
        # Inputs are dealt out: this rank's heads, one after the other.
        mine = range(tp_rank * heads * channels // tp, (tp_rank + 1) * heads * channels // tp)
        return [(f"{prefix}.o_proj.weight", row) for row in range(model.hidden_size)], mine
    # get_query_key_value_tensors views the output as (groups, (heads per group + 2) x channels) and
    # splits it into queries, key, value: so row by row, for each group, its queries, key, value.
    rows: Expected = []
    per_group = heads // attention.num_query_groups
    for group in range(attention.num_query_groups):
        for head in range(group * per_group, (group + 1) * per_group):
            for channel in range(channels):
                rows.append((f"{prefix}.q_proj.weight", head * channels + channel))
        for channel in range(channels):
            rows.append((f"{prefix}.k_proj.weight", group * channels + channel))
        for channel in range(channels):
            rows.append((f"{prefix}.v_proj.weight", group * channels + channel))
    # Outputs are dealt out evenly, in this order; with fewer groups than ranks Megatron gathers
    # them again before it cuts them into groups.
    return rows[tp_rank * len(rows) // tp : (tp_rank + 1) * len(rows) // tp], range(
        model.hidden_size
    )


def _ffn(
    prefix: str, leaf: str, model: oracle.Architecture, width: int, tp_rank: int, tp: int
) -> tuple[Expected, range | None]:
    mine = range(tp_rank * width // tp, (tp_rank + 1) * width // tp)
    if leaf == "mlp.linear_fc2.weight":
        return [(f"{prefix}.down_proj.weight", row) for row in range(model.hidden_size)], mine
    # The output is chunked in two on each rank; silu is applied to the first half: its gate.
    gate = [(f"{prefix}.gate_proj.weight", row) for row in mine]
    up = [(f"{prefix}.up_proj.weight", row) for row in mine]
    return [*gate, *up], range(model.hidden_size)
