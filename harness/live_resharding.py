"""Loading inside the ranks: one model from many checkpoints, by the bridge and by Megatron-Core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from bridge.errors import BridgeError
from harness.live import ModelRequest, build, fill, live_tensors, model
from harness.ranks import RankContext

_PADDED: Final = ("embedding.word_embeddings.weight", "output_layer.weight")


def load_by_bridge(
    context: RankContext, request: ModelRequest, sources: Mapping[str, Path]
) -> tuple[list[str], int]:
    """Load checkpoints one after the other, each over NaN, and compare with the Hugging Face one.

    A source that the bridge refuses is a difference. Ranks do not wait for each other here, so one
    may find something that another does not.

    Args:
        context: This rank.
        request: The model, from the Hugging Face checkpoint.
        sources: What to call each Megatron checkpoint, and its root directory.

    Returns:
        Every difference in words, and how many elements were compared.
    """
    ours, theirs = model(context, request), build(request)
    problems, compared = _nonzero_padding(context, request, ours)
    for name, path in sources.items():
        _forget(theirs)
        try:
            fill(theirs, replace(request, kind="megatron", path=path))
        except BridgeError as error:
            refused = f"rank {context.rank}: {name} does not load: {error.message}"
            problems += [refused, *error.where]
            continue
        found, count = _differences(context, ours, theirs, f"the bridge loads from {name}")
        problems += found
        compared += count
    return problems, compared


def load_by_megatron(
    context: RankContext, request: ModelRequest, sources: Mapping[str, Path]
) -> tuple[list[str], int]:
    """Load checkpoints with Megatron-Core's own loader, strict, and compare as above.

    Args:
        context: This rank.
        request: The model, from the Hugging Face checkpoint.
        sources: What to call each checkpoint, and its iteration directory.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    ours, theirs = model(context, request), build(request)
    problems: list[str] = []
    compared = 0
    for name, path in sources.items():
        _forget(theirs)
        # Models of several parts are stored as several state dicts over one set of keys.
        wanted = {f"model{index}": part.sharded_state_dict() for index, part in enumerate(theirs)}
        loaded = dist_checkpointing.load(wanted, str(path), strict=StrictHandling.RAISE_UNEXPECTED)
        for index, part in enumerate(theirs):
            # A stage that holds nothing has no entry; strict, anything else would miss its own.
            part.load_state_dict(loaded.get(f"model{index}", {}), strict=True)
        whose = f"Megatron-Core loads from {name}"
        found, count = _differences(context, ours, theirs, whose)
        problems += found
        compared += count
    return problems, compared


def _forget(parts: Sequence[Any]) -> None:
    """Fill with NaN: what a loader leaves out cannot pass for what was there before."""
    import torch

    for part in parts:
        for parameter in part.parameters():
            torch.nn.init.constant_(parameter, float("nan"))


def _differences(
    context: RankContext, ours: list[Any], theirs: list[Any], whose: str
) -> tuple[list[str], int]:
    from harness.compare import first_difference, words_of

    problems, compared = [], 0
    for mine, other in zip(live_tensors(ours), live_tensors(theirs), strict=True):
        compared += mine.tensor.numel()
        found = first_difference(words_of(other.tensor), words_of(mine.tensor))
        if found is not None:
            at, count = found
            problems.append(
                f"rank {context.rank}: {mine.name}{list(at)}: {count} elements differ between what "
                f"{whose} and the Hugging Face checkpoint, this one first"
            )
    return problems, compared


def _nonzero_padding(
    context: RankContext, request: ModelRequest, parts: list[Any]
) -> tuple[list[str], int]:
    """Rows of this rank that stand for no token: Megatron's softmax sees them, so all are zero."""
    from megatron.core import parallel_state

    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    problems, compared = [], 0
    for one in live_tensors(parts):
        if one.name not in _PADDED:
            continue
        first = tp_rank * one.tensor.shape[0]
        padding = one.tensor[max(0, request.spec.vocab_size - first) :]
        compared += padding.numel()
        if padding.count_nonzero():
            problems.append(f"rank {context.rank}: {one.name}: rows beyond the vocabulary not zero")
    return problems, compared
