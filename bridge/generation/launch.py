"""The ranks of a generation: this process alone, processes that it starts, or torchrun's.

Where this process starts ranks it is none itself. It waits for what they say, so it notices at once
when one dies, whatever the others are waiting for, and takes them along when it leaves. The pipes
and that care are `bridge.crew`'s.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from bridge.crew.fates import Fate
from bridge.crew.hand import LocalHand
from bridge.crew.launch import Launch, under_torchrun
from bridge.crew.local import led
from bridge.errors import EnvironmentMissingError, LayoutError, WorkerLostError
from bridge.generation.decoding import Continuation, OnStep, Step, generate
from bridge.generation.sampling import Sampling
from bridge.generation.source import ModelSource
from bridge.progress import Advance, Progress, Silent
from bridge.scratch import held_directory
from bridge.spec import ParallelLayout

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from bridge.crew.torchrun import TorchrunCrew
    from bridge.megatron_config import AttentionBackend

_LOADING: Final = "loading"
_DYING: Final = 1.0
"""Seconds for the pipe of a rank that has died to close, before others complain of its silence."""
_LONGER: Final = 15.0
"""Seconds that a collective waits longer than a rank that hangs needs to say so."""
_STORE_PREFIX: Final = "nemotron_bridge/generate"
_SMALLER: Final = "lower --batch-size or --max-new-tokens"
_SPREAD: Final = "spread the model over more machines"
_CPU_ALLOCATOR: Final = "DefaultCPUAllocator"
"""What torch names when a CPU has no memory: of its error for GPUs there is no such kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """All that a rank needs to know. Picklable.

    Args:
        model: The model.
        layout: How it is cut.
        params_dtype: torch's name of the dtype to hold and compute in.
        device: Where.
        layers: "auto", "local" or "te", the latter perhaps with one attention backend: "te-flash".
        prompts: Token ids, `check_prompts` has passed.
        max_new_tokens: As `generate` takes it.
        sampling: As `generate` takes it.
        stop_token_ids: As `generate` takes it.
        batch_size: As `generate` takes it.
        timeout: Seconds that a rank waits for the others, at most.
    """

    model: ModelSource
    layout: ParallelLayout
    params_dtype: str
    device: Literal["cpu", "cuda"]
    layers: str
    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    sampling: Sampling
    stop_token_ids: frozenset[int]
    batch_size: int
    timeout: float


def check_world(layout: ParallelLayout) -> None:
    """Refuse torchrun's ranks where they are not those of the layout.

    Raises:
        LayoutError: BR200.
    """
    size = int(os.environ["WORLD_SIZE"]) if under_torchrun() else layout.world_size
    if size != layout.world_size:
        raise LayoutError(
            f"torchrun has started {size} ranks for layout {layout.name} of {layout.world_size}",
            where=f"WORLD_SIZE={size} in the environment",
            hint=f"start {layout.world_size}, or choose --tp and --pp whose product is {size}",
        )


def run(
    request: Request, launch: Launch, *, progress: Progress, on_step: OnStep
) -> list[Continuation]:
    """Generate on the ranks of the layout.

    Args:
        request: What.
        launch: How processes are started; the block of `crew_of` that gave it has ended.
        progress: Of loading.
        on_step: Called in this process after each step.

    Returns:
        One continuation for each prompt, on every one of torchrun's ranks.

    Raises:
        WorkerLostError: BR501, a rank has died.
        EnvironmentMissingError: BR500, no GPU, or too little memory, a GPU's or this machine's.
        BridgeError: Whatever a rank refuses.
    """
    if request.device == "cuda" and request.params_dtype == "float32":
        from bridge.platform import forbid_tf32

        forbid_tf32()
    if launch.crew is not None:
        return _as_torchruns_rank(request, launch.crew, progress, on_step)
    if request.layout.world_size > 1:
        return _supervised(request, progress, on_step)
    with _new_meeting() as init_method:
        loading = progress.phase
        return _compute(
            request, _Place(rank=0, init_method=init_method),
            lambda nbytes: loading(_LOADING, nbytes), on_step,
        )  # fmt: skip


@contextlib.contextmanager
def _new_meeting() -> Iterator[str]:
    """A file that ranks of this machine meet at, for `init_method`."""
    with held_directory() as directory:
        yield f"file://{directory}/meeting"


def _supervised(request: Request, progress: Progress, on_step: OnStep) -> list[Continuation]:
    size = request.layout.world_size
    with (
        _new_meeting() as init_method,
        led(
            size + 1, _serve, (request, init_method), {}, lost=_lost, called=_called,
            timeout=request.timeout,
        ) as lead,
    ):  # fmt: skip
        nbytes = sum(lead.gather(0))
        with lead.phase(progress, _LOADING, nbytes):
            lead.gather(None)
        while True:
            told: Any = lead.gather(None)[1]
            if not isinstance(told, Step):
                found: list[Continuation] = told
                return found
            on_step(told)


def _serve(request: Request, init_method: str, *, crew: LocalHand) -> None:
    """Be a rank: the whole life of a process that `_supervised` has started."""
    import torch

    os.dup2(2, 1)  # what libraries print is no result
    size = request.layout.world_size
    if request.device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
    if Path("/sys/class/net/lo").exists():  # gloo needs no route to another machine
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

    @contextlib.contextmanager
    def loading(nbytes: int) -> Iterator[Advance]:
        crew.gather(nbytes)
        with crew.phase(Silent(), _LOADING, nbytes) as advance:
            yield advance
        crew.gather(None)

    place = _Place(rank=crew.rank - 1, init_method=init_method)
    try:
        crew.gather(_compute(request, place, loading, crew.gather))
    except RuntimeError:  # as it may be because another rank is gone: that one is to be named
        time.sleep(_DYING)
        raise


def _called(rank: int, size: int) -> str:
    """A rank of the layout: the lead is none."""
    return f"rank {rank - 1} of {size - 1}"


def _lost(rank: int, size: int, fate: Fate) -> WorkerLostError:
    if fate.killed:
        hint = f"if nobody killed it, memory ran out: {_SMALLER}, or {_SPREAD}"
    else:
        hint = "what is above may say why it ended"
    return WorkerLostError(
        f"{_called(rank, size)} {fate.how}", where=fate.where, hint=fate.hint or hint
    )


def _as_torchruns_rank(
    request: Request, crew: TorchrunCrew, progress: Progress, on_step: OnStep
) -> list[Continuation]:
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # at run time

    from bridge.crew.torchrun import joined

    phase = progress.phase if crew.rank == 0 else Silent().phase
    place = _Place(
        rank=crew.rank,
        store=PrefixStore(_STORE_PREFIX, crew.store),
        local_rank=int(os.environ.get("LOCAL_RANK", crew.rank)),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", crew.size)),
    )
    with joined(request.timeout, so="") as ranks, ranks.timed(is_timed=True):

        @contextlib.contextmanager
        def loading(nbytes: int) -> Iterator[Advance]:
            with phase(_LOADING, nbytes) as advance:
                yield ranks.renewing(ranks.brake.on(advance))

        try:
            return _compute(request, place, loading, ranks.renewing(on_step))
        except RuntimeError as error:  # as of a collective whose other end is gone
            if (lost := ranks.loss_behind()) is not None:
                raise lost from error
            raise


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """A rank among the others, as `bridge.platform.initialize` takes it."""

    rank: int
    init_method: str | None = None
    store: Store | None = None
    local_rank: int | None = None
    local_world_size: int | None = None


def _compute(
    request: Request,
    place: _Place,
    loading: Callable[[int], AbstractContextManager[Advance]],
    on_step: Callable[[Step], Any],
) -> list[Continuation]:
    """Join the ranks, build and load this one's part, and generate."""
    with _calm():
        return _compute_loudly(request, place, loading, on_step)


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """What Megatron-Core and torch have to say of packages that are not installed is no news."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
        yield


def _compute_loudly(
    request: Request,
    place: _Place,
    loading: Callable[[int], AbstractContextManager[Advance]],
    on_step: Callable[[Step], Any],
) -> list[Continuation]:
    import torch

    from bridge import platform
    from bridge.model import build_model

    kind, _, attention = request.layers.partition("-")
    platform.initialize(
        place.rank, request.layout.world_size, request.layout, init_method=place.init_method,
        store=place.store, device=request.device,
        timeout=timedelta(seconds=request.timeout + _LONGER), local_rank=place.local_rank,
        local_world_size=place.local_world_size,
    )  # fmt: skip
    try:
        parts = build_model(
            request.model.spec, request.layout, params_dtype=request.params_dtype,
            layers=cast("Literal['auto', 'local', 'te']", kind),
            attention_backend=cast("AttentionBackend", attention or "auto"),
            device=request.device,
        )  # fmt: skip
        num_elements = sum(one.numel() for part in parts for one in part.parameters())
        with loading(num_elements * request.model.itemsize) as advance:
            request.model.load(parts, request.layout, advance=advance)
        return generate(
            parts, request.model.spec, request.layout, request.prompts,
            max_new_tokens=request.max_new_tokens, sampling=request.sampling,
            stop_token_ids=request.stop_token_ids, batch_size=request.batch_size, on_step=on_step,
        )  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise EnvironmentMissingError(
            f"rank {place.rank}'s GPU has too little memory for the model and its cache",
            where=str(error).partition("\n")[0],
            hint=f"{_SMALLER}, or use more GPUs: --tp, --pp",
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and _CPU_ALLOCATOR not in str(error):
            raise
        raise EnvironmentMissingError(
            f"rank {place.rank} has too little memory for the model and its cache",
            where=str(error).partition("\n")[0].partition(_CPU_ALLOCATOR)[2].lstrip(": "),
            hint=f"{_SMALLER}, or {_SPREAD}",
        ) from error
    finally:
        platform.finalize()
