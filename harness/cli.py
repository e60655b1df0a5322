"""`nemotron-bridge`: the conversion commands of `bridge.cli`, and those that verify.

Importing this module imports no torch: `--help` is instant.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bridge import cli_generate, cli_inspect, cli_manifest, cli_verification
from bridge.cli import app
from bridge.cli_options import (
    CarryField,
    DeviceName,
    FollowLinks,
    Json,
    LayersName,
    Revision,
    TrustRemoteCode,
)
from bridge.console import diagnostics_taken, results_taken
from bridge.crew.interrupts import Terminated, terminations_raise
from bridge.errors import BridgeError, LayoutError, UsageError
from bridge.storage.input_files import follow_links_from_now_on
from bridge.visible import visible, visible_line
from harness import (
    cli_bench,
    cli_blocks,
    cli_diff,
    cli_explain,
    cli_faults,
    cli_fuzz,
    cli_golden,
    cli_parity,
    cli_qualify,
    cli_replay,
    cli_stream,
    cli_torture,
)
from harness.cli_run import (
    Format,
    ListOnly,
    Report,
    Resume,
    Select,
    Workdir,
    finish,
    print_ids,
    run_and_report,
)
from harness.cli_tools import DtypeName, Timeout

if TYPE_CHECKING:
    from bridge.spec import ModelSpec
    from harness.bench import Subject

_COMMANDS = (
    cli_inspect, cli_generate, cli_bench, cli_diff, cli_explain, cli_faults, cli_fuzz,
    cli_golden, cli_parity, cli_qualify, cli_replay, cli_torture,
)  # fmt: skip
"""Modules that add commands of their own."""
_ON_RANKS = ("parity", "verify")
"""Commands that torchrun's processes are ranks for; conversions share work by `bridge.crew`."""
_DEFAULT_LAYOUTS = ("tp1-pp1", "tp2-pp1", "tp1-pp2")


@app.command()
def verify(
    hf_model: Annotated[
        str | None, typer.Option("--hf-model", help="Checkpoint directory or Hub id.")
    ] = None,
    megatron_path: Annotated[
        Path | None,
        typer.Option("--megatron-path", help="A Megatron checkpoint to hold against it."),
    ] = None,
    manifest: cli_manifest.Manifest = None,
    config: cli_stream.Config = None,
    seed: cli_stream.Seed = 0,
    stream: cli_stream.Stream = None,
    blocks: cli_stream.StreamedBlocks = None,
    memory_budget: cli_stream.StreamBudget = "4GiB",
    resident: cli_stream.Resident = False,
    layouts: Annotated[
        str | None,
        typer.Option(
            "--layouts",
            help="Comma-separated, such as tp2-pp1,tp1-pp2; by default whichever of "
            f"{','.join(_DEFAULT_LAYOUTS)} the model can be cut into.",
        ),
    ] = None,
    dtype: DtypeName = "float32",
    device: DeviceName = "cpu",
    layers: LayersName = "auto",
    checks: Annotated[
        str | None,
        typer.Option("--checks", help="Comma-separated, such as config,logits; all by default."),
    ] = None,
    select: Select = None,
    input_: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="A probe of your own: safetensors with input_ids, optionally position_ids.",
        ),
    ] = None,
    reference_logits: Annotated[
        list[Path] | None,
        typer.Option(
            "--reference-logits",
            help="What `logits` has written where the reference runs, one file per probe. "
            "Repeatable. Files of another model or other inputs are refused.",
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    follow_links: FollowLinks = False,
    carry: CarryField = None,
    timeout: Timeout = 1800.0,
    list_only: ListOnly = False,
    json_: Json = False,
    workdir: Workdir = None,
    report: Report = None,
    resume: Resume = False,
    form: Format = "text",
) -> None:
    """Prove a conversion: from the configuration to gradients and generation, on real ranks.

    Without --megatron-path the checkpoint is converted there and back and compared; with it, that
    checkpoint is compared bit by bit and is what the ranks load. With --reference-logits the
    reference model need not run here; what needs the model itself is then left out, and said so.

    A model that does not fit into memory is streamed: configuration, logits and blocks are proved
    block by block, at real size, with its own weights or, with --config, with pseudo-random ones;
    a --megatron-path is compared bit by bit then, too. Other checks are counted as not run.

    With --manifest nothing is proved but that a directory is still what a conversion has written.
    """
    if manifest is not None:
        others = (hf_model, megatron_path, config, checks, select, layouts, input_, report)
        cli_manifest.check(manifest, alone=not any(others), json_=json_ or form == "json")
        return
    from bridge.convert import read_spec
    from harness.bench import BASE_LAYOUT
    from harness.runner import NO_REFERENCE, STREAMED
    from harness.suite import Compute, layers_named
    from harness.suite import select as select_cases
    from harness.verification import (
        checks_named,
        verification_cases,
        with_input,
        with_references,
    )

    if follow_links:
        follow_links_from_now_on()
    wanted = checks_named(checks)
    streaming = cli_stream.StreamOptions(
        config=config, seed=seed, stream=stream, blocks=blocks, memory_budget=memory_budget,
        resident=resident,
    )  # fmt: skip
    path = cli_stream.resolved(hf_model, streaming, revision, megatron=megatron_path)
    spec = read_spec(path, carry=carry or ())
    odd = cli_stream.unstreamable(
        layouts=layouts, layers=layers, resident=resident, trust_remote_code=trust_remote_code,
        reference_logits=reference_logits,
    )  # fmt: skip
    is_streamed = cli_stream.is_streamed(
        streaming, spec, dtype=dtype, device=device, wants_whole=bool(odd)
    )
    kind = layers_named(layers, device)
    if is_streamed:
        kind = kind if resident else "local"
        cli_stream.refuse(odd)
        cli_stream.refuse_unanswerable(wanted, paired=megatron_path is not None)
    names = _layout_names(spec, layouts if resident or not is_streamed else BASE_LAYOUT)
    if config is None:
        _account_for(path, megatron_path, carry=carry or ())
    subject = _subject(path, megatron_path, trust_remote_code=trust_remote_code, carry=carry or ())
    if is_streamed:
        subject = cli_stream.with_streaming(subject, streaming)
    if input_ is not None:
        subject = with_input(subject, input_, spec)
    cases = verification_cases(
        subject.name, checks=wanted, layouts=names, has_input=input_ is not None,
        compute=Compute(dtype=dtype, device=device, layers=kind),
    )  # fmt: skip
    chosen = select_cases(cases, select or ())
    if list_only:
        print_ids(chosen, json_=json_ or form == "json")
        return
    if reference_logits:
        subject = with_references(subject, reference_logits, spec, dtype=dtype)
    finish(
        run_and_report(
            chosen, {subject.name: subject}, timeout=timeout, workdir=workdir, report_dir=report,
            resume=resume, form="json" if json_ else form,
            allow_not_run=(*((NO_REFERENCE,) if reference_logits else ()), STREAMED),
            make_bench=cli_stream.bench_of(streaming, report, resume) if is_streamed else None,
        )
    )  # fmt: skip


def _account_for(hf: Path, megatron: Path | None, *, carry: Collection[str]) -> None:
    """Refuse checkpoints that no case could be run on, with one error."""
    from harness.inputs import account_for_hf, account_for_megatron

    spec = account_for_hf(hf, carry=carry)
    if megatron is not None:
        account_for_megatron(megatron, spec)


def _layout_names(spec: ModelSpec, given: str | None) -> tuple[str, ...]:
    """The layouts asked for, which must fit the model, or those of the default ones that do."""
    from harness.layouts import resolve_layout

    if given is not None:
        names = tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
        if not names:
            raise UsageError(
                "--layouts names no layout, and no ranks would be looked at",
                hint="leave it away, or give for instance tp1-pp1,tp2-pp1",
            )
        for name in names:
            resolve_layout(name, spec)  # bad usage, said before any work
        return names
    fitting = []
    for name in _DEFAULT_LAYOUTS:
        with contextlib.suppress(LayoutError):
            resolve_layout(name, spec)
            fitting.append(name)
    return tuple(fitting)


def _subject(
    path: Path, megatron: Path | None, *, trust_remote_code: bool, carry: Collection[str]
) -> Subject:
    from harness.bench import Subject

    return Subject(
        name=visible(path.resolve().name),
        hf=path,
        megatron=megatron,
        trust_remote_code=trust_remote_code,
        carry=tuple(carry),
    )


def _verify_conversion(
    hf: Path,
    megatron: Path,
    *,
    trust_remote_code: bool,
    carry: Collection[str],
    quiet: bool,
) -> None:
    """What `--verify full` adds to import and export; with `quiet` the report is on stderr."""
    from bridge.convert import read_spec
    from harness.suite import ON_CPU
    from harness.verification import CONVERSION_CHECKS, verification_cases

    names = _layout_names(read_spec(hf, carry=carry), None)
    _account_for(hf, megatron, carry=carry)
    subject = _subject(hf, megatron, trust_remote_code=trust_remote_code, carry=carry)
    cases = verification_cases(
        subject.name, checks=CONVERSION_CHECKS, layouts=names, compute=ON_CPU
    )
    finish(run_and_report(cases, {subject.name: subject}, timeout=1800.0, on_stderr=quiet))


cli_verification.full_verification = _verify_conversion
cli_verification.block_verification = cli_blocks.verify_blocks


def _run() -> None:
    """Run the command: of torchrun's processes, where it has ranks, only the first does."""
    from bridge.crew.launch import under_torchrun

    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if command not in _ON_RANKS or not under_torchrun():
        app()
    elif os.environ["RANK"] != "0":
        from harness.torchrun.keeper import keep

        keep()
    else:
        from harness.torchrun.lead import led

        with led():
            app()


class _Formatter(logging.Formatter):
    """Names in a message are shown, and no terminal does what they say."""

    def format(self, record: logging.LogRecord) -> str:
        """One message, with its traceback if it has one."""
        return visible(super().format(record), keep="\n\t")


@diagnostics_taken()
def main() -> None:
    """Run the command line; the entry point.

    Exits with 0 (passed), 1 (a check failed), 2 (bad usage or input), 3 (could not run), 130
    (interrupted, which is typer's own doing) or 143 (told to end, by SIGTERM). Errors a user can
    act on are printed without a traceback; any other is our bug, exits with 3 and keeps its own.
    Whoever stops reading what is printed changes none of that.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        with terminations_raise(), results_taken():
            _run()
    except Terminated:
        sys.stderr.write("Terminated (SIGTERM).\n")
        sys.exit(Terminated.exit_code)
    except BridgeError as error:
        sys.stderr.write("" if error.is_said else f"{error}\n")
        for note in getattr(error, "__notes__", ()):
            sys.stderr.write(f"note: {visible_line(note)}\n")
        sys.exit(error.exit_code)
    except Exception:  # noqa: BLE001 - 1 says that a check failed, which a crash does not
        traceback.print_exc()
        sys.exit(3)


if __name__ == "__main__":
    main()
