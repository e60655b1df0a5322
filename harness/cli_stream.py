"""`verify` of a model that need not fit into memory: block by block, see `harness.streaming`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from bridge.console import gib, parse_size
from bridge.errors import UsageError

if TYPE_CHECKING:
    from bridge.spec import ModelSpec
    from harness.bench import Bench, Subject

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="In place of --hf-model: a config.json, whose model is streamed with pseudo-random "
        "weights. Needs no file of them.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Which weights, with --config.")]
Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="Block by block, in bounded memory; by default where the whole model would not fit.",
    ),
]
StreamedBlocks = Annotated[
    str | None,
    typer.Option(
        "--blocks",
        help="Stream only these, such as 0,5-9, as a model of their own; `distinct` is one of "
        "each kind.",
    ),
]
StreamBudget = Annotated[
    str,
    typer.Option("--memory-budget", help="For weights while streaming, such as 4GiB."),
]
Resident = Annotated[
    bool,
    typer.Option(
        "--resident",
        help="While streaming: hold Megatron whole on the ranks of --layouts, with --layers; the "
        "logits are theirs, beside a walk for the reference and the truth.",
    ),
]
_SHARE: Final = 0.8
"""Of the memory that is free, which whole models may take."""
_OTHER: Final = 3 << 30
"""Bytes that processes, activations and the oracle take besides the models."""
_LITTLE: Final = 1 << 30
"""Bytes of models that are never the reason why something does not fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """What the command was given."""

    config: Path | None
    seed: int
    stream: bool | None
    blocks: str | None
    memory_budget: str
    resident: bool = False


def is_streamed(
    options: StreamOptions, spec: ModelSpec, *, dtype: str, device: str, wants_whole: bool
) -> bool:
    """Whether a model is streamed; where nobody has asked for it, stderr hears why.

    Args:
        options: What the command was given.
        spec: The model.
        dtype: What to compute in.
        device: Where.
        wants_whole: Whether something was asked for that only a whole model has.

    Raises:
        UsageError: BR001, flags of streaming for a model that is not to be streamed.
    """
    if options.stream is False:
        if options.config is not None or options.blocks is not None or options.resident:
            raise UsageError(
                "--config, --blocks and --resident are for streaming, which --no-stream rules out",
                hint="leave --no-stream away",
            )
        return False
    if options.resident and options.blocks is not None:
        raise UsageError(
            "--resident holds the whole model, of which --blocks takes some",
            hint="leave one of them away",
        )
    if options.config is not None or options.blocks is not None or options.stream:
        return True
    if options.resident:
        return True
    need, free = _need(spec, dtype), _free(device)
    if wants_whole or need < _LITTLE or need + _OTHER <= free * _SHARE:
        return False
    sys.stderr.write(
        f"streamed block by block: two whole models in {dtype} would take {gib(need)}, and "
        f"{gib(free)} are free; --no-stream tries it\n"
    )
    return True


def _need(spec: ModelSpec, dtype: str) -> int:
    from bridge.dtypes import dtype_named
    from bridge.parameters import num_parameters

    return 2 * num_parameters(spec) * dtype_named(dtype).itemsize


def _free(device: str) -> int:
    if device == "cuda":
        import torch

        if torch.cuda.is_available():
            free: int = torch.cuda.mem_get_info()[0]
            return free
    import psutil

    available: int = psutil.virtual_memory().available
    return available


def with_streaming(subject: Subject, options: StreamOptions) -> Subject:
    """The model under test, with what only streaming knows of it.

    Raises:
        UsageError: BR001, blocks that the model does not have.
    """
    from bridge.hf_config import CONFIG_NAME, load_hf_config
    from bridge.plan import ranges
    from harness.oracle import read_config
    from harness.streaming.segments import blocks_named

    path = subject.hf
    if path is None:
        raise ValueError(f"{subject.name} is a toy: it has no files")
    blocks = None
    if options.blocks is not None:
        blocks = tuple(blocks_named(options.blocks, read_config(load_hf_config(path))))
        numbers = ranges(blocks)
        sys.stderr.write(f"only blocks {numbers}, one after the other as a model of their own\n")
    name = subject.name
    if options.config is not None:
        place = path.resolve()
        name = place.parent.name if place.name == CONFIG_NAME else place.stem
    streamed: Literal["walk", "resident"] = "resident" if options.resident else "walk"
    return replace(subject, name=name, seed=options.seed, blocks=blocks, streamed=streamed)


def refuse_unanswerable(checks: Sequence[str], *, paired: bool) -> None:
    """Refuse checks of which streaming can answer none; with some, the others count as not run.

    Raises:
        UsageError: BR001, naming those that could be asked.
    """
    from harness.streaming.bench import CHECKS, PAIR_CHECKS

    known = (*CHECKS, *(PAIR_CHECKS if paired else ()))
    if not set(checks) & set(known):
        raise UsageError(
            f"{', '.join(checks)} cannot be answered without the whole model",
            hint=f"a streamed model is asked {', '.join(known)}; or give --no-stream",
        )


def unstreamable(
    *,
    layouts: str | None,
    layers: str,
    resident: bool,
    trust_remote_code: bool,
    reference_logits: Sequence[Path] | None,
) -> list[str]:
    """The flags given that have no meaning for a streamed model, or only for a resident one."""
    from harness.bench import BASE_LAYOUT

    odd = {
        "--layouts": not resident and layouts is not None and layouts.strip() != BASE_LAYOUT,
        "--layers": not resident and layers not in ("auto", "local"),
        "--trust-remote-code": trust_remote_code,
        "--reference-logits": bool(reference_logits),
    }
    return [flag for flag, given in odd.items() if given]


def refuse(flags: Sequence[str]) -> None:
    """Refuse flags that have no meaning for a streamed model.

    Raises:
        UsageError: BR001, if there are any.
    """
    if not flags:
        return
    raise UsageError(
        f"{', '.join(flags)} is not for a streamed model",
        hint="it runs on one rank, against transformers' Llama or bridge.decilm; leave that away, "
        "or give --no-stream, or --resident for layouts and layers",
    )


def bench_of(options: StreamOptions, report: Path | None, resume: bool) -> Callable[..., Bench]:
    """What makes the bench of a run: `harness.bench.Bench`'s arguments to a streaming one.

    Args:
        options: Of the command.
        report: Where states are kept; None keeps none.
        resume: Go on from what is kept there.
    """
    from harness.streaming.bench import StreamingBench
    from harness.streaming.walking import Streaming

    budget = parse_size(options.memory_budget)
    streaming = Streaming(memory_budget=budget, keep=report, resume=resume)
    return partial(StreamingBench, streaming=streaming)


def resolved(
    hf_model: str | None, options: StreamOptions, revision: str | None, *, megatron: Path | None
) -> Path:
    """Where the model is: the configuration alone, or what `--hf-model` names.

    Raises:
        UsageError: BR001, neither or both are given, or a Megatron checkpoint that cannot be held
            against it or is a URL.
    """
    from bridge.hf_config import config_file
    from bridge.hub import resolve_here

    if (hf_model is None) == (options.config is None):
        raise UsageError("give either --hf-model, or --config for a configuration without weights")
    if megatron is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(megatron)):
        raise UsageError(
            "--megatron-path of verify takes no URL", where=str(megatron),
            hint="copy the checkpoint to a directory, or export it from where it is",
        )  # fmt: skip
    if options.config is not None:
        if megatron is not None:
            raise UsageError(
                "a configuration has no weights to hold --megatron-path against",
                hint="give --hf-model",
            )
        return config_file(options.config)
    return resolve_here(str(hf_model), weights=True, revision=revision)
