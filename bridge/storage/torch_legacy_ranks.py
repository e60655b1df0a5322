"""The ranks of a `torch` checkpoint: which there are, and whether they are of one save.

Every rank's file says of which run and iteration it is. They are compared because nothing else
would tell: shards of two iterations fit together as well as those of one.
"""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Mapping
from itertools import islice
from typing import Any, Final

from bridge.errors import CheckpointError, CorruptFileError
from bridge.storage.input_files import refuse_link_out
from bridge.storage.remote import Location

RankName = tuple[int, int]
"""TP rank and PP rank."""

_RANK: Final = re.compile(r"mp_rank_(?P<tp>\d{2,})(?:_(?P<pp>\d{3,}))?(?P<expert>_\d{3,})?")
_OLDEST_VERSION: Final = 2.0
_MOST_RANKS: Final = 1024  # along one axis; more is no size of a run
_MOST_NAMED: Final = 16  # of the missing ranks, which may be nearly all of 1024 x 1024

# What all ranks of a run have alike. Others of the hundreds of args, such as `rank`, do not.
_SAME_STATE: Final = ("iteration", "checkpoint_version")
_SAME_ARGS: Final = (
    "num_layers", "hidden_size", "num_attention_heads", "group_query_attention",
    "num_query_groups", "kv_channels", "ffn_hidden_size", "max_position_embeddings",
    "position_embedding_type", "rotary_base", "rotary_percent", "rotary_interleaved",
    "use_rope_scaling", "rope_scaling_factor", "swiglu", "normalization", "norm_epsilon",
    "apply_layernorm_1p", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "squared_relu",
    "num_experts", "untie_embeddings_and_output_weights", "vocab_size", "padded_vocab_size",
    "make_vocab_size_divisible_by", "params_dtype", "heterogeneous_layers_config_encoded_json",
    "tensor_model_parallel_size", "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
)  # fmt: skip
_OF_ONE_RUN: Final = "the ranks' files must be of one iteration of one run"


def rank_directories(directory: Location) -> dict[RankName, str]:
    """The directories of a `torch` checkpoint's ranks, by TP and PP rank; empty if it is not one.

    Raises:
        CheckpointError: BR300, ranks of expert parallelism.
        CorruptFileError: BR302, two directories of one rank, or one of a rank that no run has.
        UnsafeFileError: BR307, a directory that is a link to somewhere else.
    """
    found: dict[RankName, str] = {}
    for child in directory.iterdir():
        match = _RANK.fullmatch(child.name)
        if match is None:
            continue
        if match["expert"]:
            raise CheckpointError(
                "the checkpoint was cut by expert parallelism, which no model of the family has",
                where=str(child),
            )
        refuse_link_out(child)
        rank = int(match["tp"]), int(match["pp"] or 0)
        if max(rank) >= _MOST_RANKS:
            raise CorruptFileError(
                f"the directory is of TP rank {rank[0]} and PP rank {rank[1]}, and no run has more "
                f"than {_MOST_RANKS} of either",
                where=str(child),
                hint="remove it: Megatron-LM did not write it",
            )
        if rank in found:
            raise CorruptFileError(
                f"two directories are of TP rank {rank[0]} and PP rank {rank[1]}",
                where=sorted(str(directory / name) for name in (found[rank], child.name)),
                hint="they are of two runs, with and without pipeline parallelism: remove the "
                "directories of one of them",
            )
        found[rank] = child.name
    return found


def refuse_missing_ranks(
    ranks: Mapping[RankName, str], directory: Location, args: Mapping[str, Any] | None = None
) -> None:
    """Refuse a checkpoint whose ranks are not TP times PP.

    Args:
        ranks: Those that there are.
        directory: Where they are.
        args: Of the checkpoint; they tell of ranks after the last that there is.

    Raises:
        CheckpointError: BR300, ranks are missing; the first of them by name.
        CorruptFileError: BR302, more ranks than the run had.
    """
    tp, pp = (1 + max(rank[axis] for rank in ranks) for axis in (0, 1))
    said_tp = _size(args, "tensor_model_parallel_size", tp)
    said_pp = _size(args, "pipeline_model_parallel_size", pp)
    if tp > said_tp or pp > said_pp:
        raise CorruptFileError(
            f"the args say {said_tp} x {said_pp} TP and PP ranks, and directories of {tp} x {pp} "
            "are there",
            where=str(directory),
            hint="remove the directories that another run left",
        )
    present = {rank for rank in ranks if rank[0] < said_tp and rank[1] < said_pp}
    num_missing = said_tp * said_pp - len(present)
    if num_missing:
        each = ((t, p) for p in range(said_pp) for t in range(said_tp))
        missing = list(islice((rank for rank in each if rank not in present), _MOST_NAMED))
        names = [f"{directory}: mp_rank_{t:02d}_{p:03d}" for t, p in missing]
        if num_missing > len(names):
            names.append(f"and {num_missing - len(names)} more")
        raise CheckpointError(
            f"{num_missing} of {said_tp} x {said_pp} ranks are missing",
            where=names,
            hint="copy the checkpoint of every TP and PP rank into one directory",
        )


def _size(args: Mapping[str, Any] | None, name: str, found: int) -> int:
    """What the args say, where that is a size that a run can have."""
    said = None if args is None else args.get(name)
    if isinstance(said, int) and not isinstance(said, bool) and 0 < said <= _MOST_RANKS:
        return said
    return found


def args_of(common: Mapping[str, Any], *, where: str) -> Mapping[str, Any] | None:
    """The `args` of a checkpoint's common state as a mapping, None when there are none.

    Raises:
        CorruptFileError: BR302, neither a Namespace nor a mapping.
    """
    args = common.get("args")
    if args is None or isinstance(args, Mapping):
        return args
    if isinstance(args, Namespace):
        return dict(vars(args))
    raise CorruptFileError(
        f"args is {type(args).__name__}, neither an argparse.Namespace nor a mapping", where=where
    )


def refuse_old(version: object, *, where: str) -> None:
    """Refuse a `checkpoint_version` whose rows of linear_qkv are in another order.

    Raises:
        CheckpointError: BR300, it is too old.
        CorruptFileError: BR302, it is no version.
    """
    if (
        not isinstance(version, int | float)
        or isinstance(version, bool)
        or not math.isfinite(version)
    ):
        raise CorruptFileError(
            f"checkpoint_version {version!r:.40} is not a number",
            where=where,
            hint="Megatron-LM writes the number 3.0; save the checkpoint with it",
        )
    if version < _OLDEST_VERSION:
        raise CheckpointError(
            f"checkpoint_version {version} keeps the rows of linear_qkv in another order",
            where=where,
            hint="load and save it with Megatron-LM, which brings it to version 3",
        )


def refuse_unlike_ranks(states: Mapping[str, Mapping[Any, Any]]) -> None:
    """Refuse files of several iterations, versions or models, by file.

    Args:
        states: What each rank's file holds, the first rank's first.

    Raises:
        CorruptFileError: BR302, every difference from the first rank.
    """
    (first_file, first), *others = states.items()
    expected = _identity(first, first_file)
    wrong = []
    for file, state in others:
        found = _identity(state, file)
        wrong += [
            f"{file}: {name} is {found[name]!r:.60}, in {first_file} {expected[name]!r:.60}"
            for name in expected
            if found[name] != expected[name]
        ]
    if wrong:
        raise CorruptFileError(
            "the ranks' files are not of one save: they say different things",
            where=wrong,
            hint=_OF_ONE_RUN,
        )


def _identity(state: Mapping[Any, Any], file: str) -> dict[str, Any]:
    args = args_of(state, where=file)
    return {
        **{name: state.get(name) for name in _SAME_STATE},
        "args": "none" if args is None else "present",
        **{f"args.{name}": (args or {}).get(name) for name in _SAME_ARGS},
    }
