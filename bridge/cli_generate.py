"""`generate`: text from the Megatron model."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from bridge.cli import app
from bridge.cli_options import (
    CarryField,
    DeviceName,
    LayersName,
    PpSize,
    Revision,
    TpSize,
    VppSize,
)
from bridge.console import RichProgress, counter
from bridge.errors import UsageError
from bridge.visible import visible_prose

_LONGEST: Final = 365 * 24 * 3600
"""Seconds to wait, at most: the clocks of sockets and of C++ overflow at some centuries."""

if TYPE_CHECKING:
    from bridge.generation.decoding import FinishReason, Step
    from bridge.generation.launch import Request
    from bridge.generation.prompts import Prompt
    from bridge.generation.text import Tokenizer


@app.command()
def generate(
    hf_model: Annotated[
        str | None,
        typer.Option(
            "--hf-model",
            help="Checkpoint directory, URL or Hub id. With --megatron-path only its tokenizer and "
            "configuration are used.",
        ),
    ] = None,
    megatron_path: Annotated[
        str | None,
        typer.Option(
            "--megatron-path",
            help="A Megatron checkpoint to run. One that was imported has kept its tokenizer.",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Text to continue. Repeatable.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="A file of prompts, one a line; with the suffix .jsonl one object a line, with "
            "prompt, messages or token_ids.",
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Take prompts for what a user says, by the chat template."),
    ] = False,
    system: Annotated[
        str | None, typer.Option("--system", help="The system message of each chat.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="For each prompt, at most.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="0 takes the likeliest token each time.")
    ] = 0.0,
    top_k: Annotated[
        int,
        typer.Option("--top-k", min=0, help="Draw from so many of the likeliest tokens; 0: all."),
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p", help="Draw from the likeliest that have this probability together."
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is drawn.")] = 0,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Prompts that are computed together.")
    ] = 8,
    tp: TpSize = 1,
    pp: PpSize = 1,
    vp: VppSize = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option("--dtype", help="What to compute in; by default the model's own."),
    ] = "auto",
    device: DeviceName = "cpu",
    layers: LayersName = "auto",
    revision: Revision = None,
    carry: CarryField = None,
    timeout: Annotated[
        float,
        typer.Option("--timeout", min=1, help="Seconds that a rank may wait for the others."),
    ] = 1800.0,
    json_: Annotated[
        bool, typer.Option("--json", help="Print one JSON document a prompt, each on one line.")
    ] = False,
) -> None:
    """Continue prompts with the Megatron model: from its own checkpoint, or from Hugging Face's.

    Ranks of --tp and --pp are started here, or are torchrun's. Greedy unless --temperature is
    given. One prompt appears as it is written; the results of several when they are complete.
    """
    from bridge.crew.launch import crew_of
    from bridge.generation.decoding import check_prompts
    from bridge.generation.launch import Request, check_world, run
    from bridge.generation.prompts import given_prompts
    from bridge.generation.sampling import Sampling
    from bridge.generation.source import find_model
    from bridge.generation.text import Tokenizer, stop_token_ids
    from bridge.pipeline import plan_layout

    with crew_of(None) as launch:
        if not 1 <= timeout <= _LONGEST:  # which NaN is not either
            raise UsageError(
                f"--timeout {timeout:g} is not between 1 second and a year", hint="leave it away"
            )
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        given = given_prompts(prompt or (), prompts)
        if system is not None and not chat and any(one.messages is None for one in given):
            raise UsageError("--system is for chats", hint="give --chat too")
        megatron = None if megatron_path is None else _path(megatron_path)
        model = find_model(hf_model, megatron, revision=revision, carry=carry or ())
        layout = plan_layout(
            model.spec,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vp,
        )
        check_world(layout)
        tokenizer = None
        if any(one.token_ids is None for one in given):
            tokenizer = Tokenizer.of(model.directory)
        token_ids = tuple(one.encode(tokenizer, chat=chat, system=system) for one in given)
        names = [one.where for one in given]
        check_prompts(token_ids, model.spec, max_new_tokens=max_new_tokens, names=names)
        request = Request(
            model=model, layout=layout, device=device, layers=layers,
            params_dtype=model.spec.params_dtype if dtype == "auto" else dtype,
            prompts=token_ids, max_new_tokens=max_new_tokens, sampling=sampling,
            stop_token_ids=stop_token_ids(model.directory, model.config, tokenizer),
            batch_size=batch_size, timeout=timeout,
        )  # fmt: skip
    page = _Page(given, request, tokenizer, json_=json_, silent=launch.rank > 0)
    try:
        run(request, launch, progress=RichProgress(), on_step=page.on_step)
    finally:
        page.close()


def _path(text: str) -> Path:
    """A path of this machine, perhaps written as a `file://` URL: ranks read nothing else."""
    from bridge.storage.remote import is_url, parse_location

    location = parse_location(text) if text.startswith("file://") or not is_url(text) else None
    if not isinstance(location, Path):
        raise UsageError(
            "a Megatron checkpoint behind a URL cannot be run",
            where=text,
            hint="copy it to this machine; only --hf-model may be a URL",
        )
    return location


class _Page:
    """What the user sees of it: one text while it grows, or several in order.

    Args:
        given: The prompts.
        request: The same as token ids.
        tokenizer: None shows token ids only.
        json_: As JSON lines.
        silent: Not at all.
    """

    def __init__(
        self,
        given: Sequence[Prompt],
        request: Request,
        tokenizer: Tokenizer | None,
        *,
        json_: bool,
        silent: bool,
    ) -> None:
        self._given, self._request, self._json, self._silent = given, request, json_, silent
        self._tokenizer = tokenizer
        self._is_live = len(given) == 1 and not json_ and tokenizer is not None
        self._token_ids: list[list[int]] = [[] for _ in given]
        self._stream = None if tokenizer is None else tokenizer.stream()
        self._waiting: dict[int, FinishReason] = {}
        self._is_open = False
        self._next = 0
        self._started = time.perf_counter()
        self._counter = ExitStack()
        self._count: Callable[[int], None] | None = None

    def on_step(self, step: Step) -> None:
        """Show what it has added, as far as it is its turn."""
        if self._silent:
            return
        if self._count is None:  # now, because a bar for loading has been there until now
            most = len(self._given) * self._request.max_new_tokens
            self._count = self._counter.enter_context(counter("tokens, at most", most))
        self._count(len(step.tokens))
        for index, token in step.tokens:
            self._token_ids[index].append(token)
            if self._is_live and self._stream is not None:
                self._is_open = True
                typer.echo(_shown(self._stream.put(token)), nl=False)
        self._waiting |= dict(step.finished)
        while self._next in self._waiting:
            self._show(self._next, self._waiting.pop(self._next))
            self._next += 1

    def close(self) -> None:
        """Show what is complete and has had to wait for others, if they never came."""
        self._counter.close()
        for index, reason in sorted(self._waiting.items()):
            self._show(index, reason)
        if self._is_open and self._stream is not None:
            typer.echo(_shown(self._stream.end()))  # so that what went wrong has a line of its own
        num_tokens = sum(map(len, self._token_ids))
        if num_tokens:
            seconds = time.perf_counter() - self._started
            sys.stderr.write(
                f"{num_tokens} tokens in {seconds:.1f} s with start and loading, "
                f"{self._request.layout.name}\n"
            )

    def _show(self, index: int, reason: FinishReason) -> None:
        token_ids = self._token_ids[index]
        if self._is_live and self._stream is not None:
            self._is_open = False
            typer.echo(_shown(self._stream.end()))
            return
        text = None if self._tokenizer is None else self._tokenizer.decode(token_ids)
        if self._json:
            given = self._given[index]
            found: dict[str, Any] = {
                "index": index,
                "prompt": given.text if given.messages is None else list(given.messages),
                "num_prompt_tokens": len(self._request.prompts[index]),
                "token_ids": token_ids,
                "text": text,
                "finish_reason": reason,
            }
            typer.echo(json.dumps(found, ensure_ascii=False))
            return
        if len(self._given) > 1:
            typer.echo(f"--- {self._given[index].where}")
        typer.echo(_shown(text) if text is not None else " ".join(map(str, token_ids)))


def _shown(text: str) -> str:
    """A model may write escape sequences: a terminal is not given them, a file is."""
    return visible_prose(text) if sys.stdout.isatty() else text
