"""The loop: feed, choose, tell every rank, until each sequence has ended.

Prompts of unequal lengths go through one batch without padding. All sequences of a batch are always
equally long: it starts with as many tokens as the shortest prompt has, and a sequence whose prompt
goes on takes its next token from there, where the others take the one that was chosen. So no row
needs a mask or positions of its own, and each gives what it gives alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Final, Literal

import torch

from bridge.errors import LayoutError, UsageError
from bridge.forward import current_device
from bridge.generation.decoder import Decoder
from bridge.generation.sampling import GREEDY, Sampling, choose
from bridge.live_layout import bare_parts, layout_of
from bridge.spec import ModelSpec, ParallelLayout

DEFAULT_BATCH_SIZE: Final = 8
_TO_LISTS: Final = "token ids are ints; `tolist()` makes lists of a tensor's"

FinishReason = Literal["stop", "length"]
"""A token that ends the text was chosen, or there are as many as were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one step of a batch has added.

    Args:
        tokens: Index of the prompt and the token chosen for it, of those that got one.
        finished: Index of the prompt and why nothing follows, of those that have ended.
    """

    tokens: tuple[tuple[int, int], ...]
    finished: tuple[tuple[int, FinishReason], ...]


OnStep = Callable[[Step], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """What a model made of a prompt.

    Args:
        token_ids: The new tokens, with the one that ends the text if one does.
        finish_reason: Why there are no more.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason


def generate(
    model_parts: Sequence[Any],
    spec: ModelSpec,
    layout: ParallelLayout,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_token_ids: Collection[int] = (),
    batch_size: int = DEFAULT_BATCH_SIZE,
    on_step: OnStep | None = None,
) -> list[Continuation]:
    """Continue prompts. Every rank of the layout makes the same call, and gets the same result.

    Args:
        model_parts: What `bridge.model.build_model` or `AutoBridge` gave this rank, weights
            loaded, in the wrappers of mixed precision and data parallelism or bare. In training
            mode they leave it for the time of the call.
        spec: The model.
        layout: How it is cut, without sequence parallelism.
        prompts: Token ids.
        max_new_tokens: For each prompt, at most.
        sampling: How tokens are chosen; greedily by default.
        stop_token_ids: Tokens that end a text.
        batch_size: Sequences that are computed together, longest prompts first. It bounds the
            memory of the cache and changes the results by no more than the rounding of sums.
        on_step: Called on this rank after each step, with what it has added.

    Returns:
        One for each prompt, in their order.

    Raises:
        UsageError: BR001, see `check_prompts`; or a batch of nothing.
        InconsistentConfigError: BR104, token ids outside the vocabulary; NaN or infinite logits.
        LayoutError: BR200, sequence parallelism, or parts that are cut otherwise than `layout`.
    """
    check_prompts(prompts, spec, max_new_tokens=max_new_tokens)
    if batch_size < 1:
        raise UsageError(f"a batch of {batch_size} sequences", hint="give 1 or more")
    parts = bare_parts(model_parts)
    _refuse_another_cut(layout_of(parts, spec), layout)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    found: dict[int, Continuation] = {}
    with _evaluating(parts):
        for start in range(0, len(order), batch_size):
            rows = [
                _Row(index, tuple(prompts[index]), sampling.generator(index))
                for index in order[start : start + batch_size]
            ]
            decoder = Decoder(
                parts, spec, layout, batch_size=len(rows),
                # Nothing is computed behind the last token.
                max_sequence_length=max(len(row.prompt) for row in rows) + max_new_tokens - 1,
            )  # fmt: skip
            _decode(decoder, rows, layout, max_new_tokens, sampling, stop_token_ids, on_step)
            found |= {row.index: row.continuation() for row in rows}
    return [found[index] for index in range(len(prompts))]


def _refuse_another_cut(found: ParallelLayout, layout: ParallelLayout) -> None:
    """How a vocabulary is padded is no question of where its rows are."""
    names = (
        "tensor_model_parallel_size", "pipeline_model_parallel_size", "num_layers_per_stage",
        "sequence_parallel",
    )  # fmt: skip
    wrong = [
        f"{name}: {getattr(found, name)}, the layout has {getattr(layout, name)}"
        for name in names
        if getattr(found, name) != getattr(layout, name)
    ]
    if wrong:
        raise LayoutError(
            f"the model is cut as {found.name}, not as the layout {layout.name} says",
            where=wrong,
            hint="give the layout that the model was built for, on all of its ranks",
        )


@contextmanager
def _evaluating(parts: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Megatron has a cache in evaluation mode only; afterwards each module has its own again."""
    training = [module for part in parts for module in part.modules() if module.training]
    try:
        for part in parts:
            part.eval()
        yield
    finally:
        for module in training:
            module.training = True


def check_prompts(
    prompts: Sequence[Sequence[int]],
    spec: ModelSpec,
    *,
    max_new_tokens: int,
    names: Sequence[str] | None = None,
) -> None:
    """Refuse what cannot be continued, all of it at once.

    Args:
        prompts: Token ids.
        spec: The model.
        max_new_tokens: For each.
        names: What to call the prompts in an error; by default they are counted from 1.

    Raises:
        UsageError: BR001, no new tokens, prompts that are no token ids, an empty one, ids outside
            the vocabulary, or more tokens than the model has positions.
    """
    if not isinstance(prompts, Sequence):
        raise UsageError(
            f"prompts are lists of token ids, and this is a {type(prompts).__name__}",
            hint=_TO_LISTS,
        )
    if max_new_tokens < 1:
        raise UsageError(f"{max_new_tokens} new tokens are none", hint="ask for 1 or more")
    limit = spec.max_position_embeddings
    wrong, hint = [], None
    names = names or [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    for name, prompt in zip(names, prompts, strict=True):
        if not _are_token_ids(prompt):
            hint = hint or _TO_LISTS
            wrong.append(f"{name} is no list of token ids")
        elif not prompt:
            wrong.append(f"{name} is empty")
        elif not 0 <= min(prompt) <= max(prompt) < spec.vocab_size:
            wrong.append(f"{name} has tokens outside [0, {spec.vocab_size})")
        elif len(prompt) + max_new_tokens > limit:
            hint = "shorten the prompt or ask for fewer new tokens"
            wrong.append(
                f"{name}: {len(prompt)} tokens and {max_new_tokens} new ones are more "
                f"than max_position_embeddings={limit}"
            )
    if wrong:
        raise UsageError(
            f"{len(wrong)} of {len(prompts)} prompts cannot be continued",
            where=wrong,
            hint=hint,
        )


def _are_token_ids(prompt: object) -> bool:
    return isinstance(prompt, Sequence) and all(
        isinstance(one, Integral) and not isinstance(one, bool) for one in prompt
    )


@dataclass(slots=True)
class _Row:
    """One sequence of a batch."""

    index: int
    prompt: tuple[int, ...]
    generator: torch.Generator
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def is_due(self, position: int) -> bool:
        """Whether the token at that position is to be chosen."""
        return self.finish_reason is None and position >= len(self.prompt)

    def at(self, position: int) -> int:
        """The token there; any, where the sequence has ended."""
        if position < len(self.prompt):
            return self.prompt[position]
        return self.token_ids[min(position - len(self.prompt), len(self.token_ids) - 1)]

    def continuation(self) -> Continuation:
        assert self.finish_reason is not None  # noqa: S101 - the loop ends no sooner
        return Continuation(token_ids=tuple(self.token_ids), finish_reason=self.finish_reason)


def _decode(
    decoder: Decoder,
    rows: Sequence[_Row],
    layout: ParallelLayout,
    max_new_tokens: int,
    sampling: Sampling,
    stop_token_ids: Collection[int],
    on_step: OnStep | None,
) -> None:
    position = min(len(row.prompt) for row in rows)
    fed = torch.tensor([row.prompt[:position] for row in rows])
    while True:
        due = [row.is_due(position) for row in rows]
        logits = decoder.feed(fed)
        if any(due):
            chosen = _agreed(logits, sampling, rows, due, layout)
            step = _append(rows, due, chosen, max_new_tokens, stop_token_ids)
            if on_step is not None:
                on_step(step)
        if all(row.finish_reason is not None for row in rows):
            return
        fed = torch.tensor([[row.at(position)] for row in rows])
        position += 1


def _append(
    rows: Sequence[_Row],
    due: Sequence[bool],
    chosen: Sequence[int],
    max_new_tokens: int,
    stop_token_ids: Collection[int],
) -> Step:
    tokens, finished = [], []
    for row, is_due, token in zip(rows, due, chosen, strict=True):
        if not is_due:
            continue
        row.token_ids.append(token)
        tokens.append((row.index, token))
        if token in stop_token_ids:
            row.finish_reason = "stop"
        elif len(row.token_ids) == max_new_tokens:
            row.finish_reason = "length"
        if row.finish_reason is not None:
            finished.append((row.index, row.finish_reason))
    return Step(tokens=tuple(tokens), finished=tuple(finished))


def _agreed(
    logits: torch.Tensor | None,
    sampling: Sampling,
    rows: Sequence[_Row],
    due: Sequence[bool],
    layout: ParallelLayout,
) -> list[int]:
    """Tokens chosen by one rank, the first of the last stage, and known to all."""
    from megatron.core import parallel_state

    group = parallel_state.get_model_parallel_group()
    ranks = torch.distributed.get_process_group_ranks(group)
    last_stage = list(layout.stages())[-1]
    chooser = ranks[last_stage.pp_rank * layout.tensor_model_parallel_size]
    chosen = [0] * len(rows)
    if torch.distributed.get_rank() == chooser:
        assert logits is not None  # noqa: S101 - it is of the last stage
        generators = [row.generator if it else None for row, it in zip(rows, due, strict=True)]
        chosen = choose(logits, sampling, generators)
    if len(ranks) == 1:
        return chosen
    shared = torch.tensor(chosen, device=current_device())
    torch.distributed.broadcast(shared, chooser, group=group)
    agreed: list[int] = shared.tolist()
    return agreed
