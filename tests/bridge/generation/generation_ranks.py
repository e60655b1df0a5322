"""What generation does inside rank processes; a module, because ranks import it by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bridge import AutoBridge
from bridge.convert import read_spec
from bridge.crew.hand import LocalHand
from bridge.errors import LayoutError
from bridge.generation import launch
from bridge.generation.decoding import Continuation, OnStep, Step, generate
from bridge.generation.sampling import Sampling
from bridge.live_layout import bare_parts, layout_of
from bridge.pipeline import parse_layout
from harness.live import ModelRequest, model
from harness.ranks import RankContext

Told = tuple[list[Continuation], list[Step]]


def continuations(
    context: RankContext,
    request: ModelRequest,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_token_ids: list[int],
    batch_size: int,
) -> Told:
    """What each rank makes of prompts, and what it was told on the way."""
    steps: list[Step] = []
    found = generate(
        model(context, request), request.spec, request.layout, prompts,
        max_new_tokens=max_new_tokens, sampling=sampling, stop_token_ids=stop_token_ids,
        batch_size=batch_size, on_step=steps.append,
    )  # fmt: skip
    return found, steps


def in_training(
    _context: RankContext,
    hf: Path,
    pp: int,
    prompts: list[list[int]],
    max_new_tokens: int,
) -> tuple[list[Continuation], list[Continuation], list[list[bool]]]:
    """Of a model as `AutoBridge` gives it and of its bare parts; each module's mode three times.

    That is before, after, and after an error. A module that somebody has frozen is not in training.
    """
    bridge = AutoBridge.from_hf_pretrained(hf)
    provider = bridge.to_megatron_provider()
    provider.pipeline_model_parallel_size = pp
    provider.finalize()
    wrapped = provider.provide_distributed_model(wrap_with_ddp=False)
    parts, spec = bare_parts(wrapped), read_spec(hf)
    assert type(wrapped[0]) is not type(parts[0])
    layout = layout_of(parts, spec)
    parts[0].decoder.layers[0].eval()
    modes = []

    def note_modes() -> None:
        modes.append([one.training for part in wrapped for one in part.modules()])

    def fail(_step: Step) -> None:
        raise ArithmeticError

    def spoken(model: list[Any], on_step: OnStep | None = None) -> list[Continuation]:
        return generate(
            model, spec, layout, prompts, max_new_tokens=max_new_tokens, on_step=on_step
        )

    note_modes()
    found = spoken(wrapped)
    note_modes()
    with suppress(ArithmeticError):
        spoken(wrapped, fail)
    note_modes()
    for part in wrapped:
        part.eval()
    return found, spoken(parts), modes


def under_another_layout(context: RankContext, request: ModelRequest, layout: str) -> str:
    """What is said to a layout that the model is not cut by."""
    try:
        generate(
            model(context, request), request.spec, parse_layout(layout, request.spec), [[1]],
            max_new_tokens=1,
        )  # fmt: skip
    except LayoutError as error:
        return str(error)
    return ""


def cached_and_whole(
    context: RankContext, request: ModelRequest, tokens: list[list[int]], start: int
) -> list[tuple[float, float]]:
    """Of each token's logits: the rms error through the cache, and the rms without one."""
    from bridge.forward import forward, from_last_stage
    from bridge.generation.decoder import Decoder

    parts, ids = model(context, request), torch.tensor(tokens)
    (batch, length), vocab_size = ids.shape, request.spec.vocab_size
    decoder = Decoder(
        parts, request.spec, request.layout, batch_size=batch, max_sequence_length=length
    )
    found = []
    for end in range(start, length + 1):
        logits = decoder.feed(ids[:, :start] if end == start else ids[:, end - 1 : end])
        cached = from_last_stage(logits, (batch, vocab_size), parts, request.layout)
        with torch.no_grad():
            whole = forward(parts, request.spec, request.layout, ids[:, :end])[:, -1]
        error, size = (one.double().square().mean().sqrt() for one in (cached - whole, whole))
        found.append((float(error), float(size)))
    return found


def refusals(context: RankContext, request: ModelRequest) -> list[str]:
    """What a decoder of 2 sequences of 4 tokens says to tokens that it has no place for."""
    from bridge.errors import InconsistentConfigError
    from bridge.generation.decoder import Decoder

    parts = model(context, request)
    decoder = Decoder(parts, request.spec, request.layout, batch_size=2, max_sequence_length=4)
    said = []
    for batch, length in ((1, 1), (2, 5), (2, 3), (2, 2), (2, 1), (2, 1)):
        try:
            decoder.feed(torch.zeros(batch, length, dtype=torch.int64))
            said.append("")
        except InconsistentConfigError as error:
            said.append(error.message)
    return said


def serve_and_die(request: launch.Request, init_method: str, *, crew: LocalHand) -> None:
    """A rank as `launch` runs it, whose second process is killed in the middle of a text."""
    from bridge.generation.decoder import Decoder

    healthy = Decoder.feed

    def feed(self: Decoder, input_ids: torch.Tensor) -> torch.Tensor | None:
        if self.num_tokens > 4 and crew.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return healthy(self, input_ids)

    Decoder.feed = feed  # type: ignore[method-assign]  # this process ends with it
    launch._serve(request, init_method, crew=crew)


def serve_for_ever(_request: launch.Request, _init_method: str, *, crew: LocalHand) -> None:
    """A rank as `launch` hears it, without a model and without an end."""
    crew.gather(1)
    crew.gather(None)
    while True:
        crew.gather(Step(tokens=((0, 7),), finished=()))


def _serve_until(
    what: Callable[[], None], request: launch.Request, init_method: str, crew: LocalHand
) -> None:
    """A rank as `launch` runs it, to whose second process something happens within a text."""
    from bridge.generation.decoder import Decoder

    healthy = Decoder.feed

    def feed(self: Decoder, input_ids: torch.Tensor) -> torch.Tensor | None:
        if self.num_tokens > 4 and crew.rank == 2:
            what()
        return healthy(self, input_ids)

    Decoder.feed = feed  # type: ignore[method-assign]  # this process ends with it
    launch._serve(request, init_method, crew=crew)


def serve_and_stop(request: launch.Request, init_method: str, *, crew: LocalHand) -> None:
    """It is stopped."""
    _serve_until(lambda: os.kill(os.getpid(), signal.SIGSTOP), request, init_method, crew)


def hang() -> None:
    """Get no further."""
    time.sleep(600)


def serve_and_hang(request: launch.Request, init_method: str, *, crew: LocalHand) -> None:
    """It hangs."""
    _serve_until(hang, request, init_method, crew)
