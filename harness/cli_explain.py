"""`explain`: what an error code stands for, and how to mend it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Annotated

import typer

import bridge.errors
import harness.errors
from bridge.cli import app
from bridge.cli_options import Json
from bridge.console import print_json, stdout, table
from bridge.errors import BridgeError, UsageError

Code = Annotated[
    str | None, typer.Argument(metavar="CODE", help="Such as BR201; left away, all are listed.")
]


def error_kinds() -> Mapping[str, type[BridgeError]]:
    """Every error of the project by its code, in the order of the codes."""
    found = [
        kind
        for module in (bridge.errors, harness.errors)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, BridgeError) and kind is not BridgeError
    ]
    return {kind.code: kind for kind in sorted(found, key=lambda kind: kind.code)}


def explanation(kind: type[BridgeError]) -> str:
    """What an error means and how to mend it: its docstring, without its arguments."""
    return (inspect.getdoc(kind) or "").partition("\n\nArgs:")[0]


@app.command()
def explain(code: Code = None, json_: Json = False) -> None:
    """Say what an error code means, and how to mend it."""
    kinds = error_kinds()
    if code is not None:
        wanted = code.upper()
        if wanted not in kinds:
            raise UsageError(f"no error has the code {code}", hint="`explain` lists all of them")
        kinds = {wanted: kinds[wanted]}
    if json_:
        print_json([
            {"code": one, "name": kind.__name__, "exit_code": kind.exit_code,
             "explanation": explanation(kind)}
            for one, kind in kinds.items()
        ])  # fmt: skip
    elif code is not None:
        for one, kind in kinds.items():
            typer.echo(f"{one} {explanation(kind)}\n\nThe command exits with {kind.exit_code}.")
    else:
        rows = table("code", "what it says", "exit code", right=("exit code",))
        for one, kind in kinds.items():
            rows.add_row(one, explanation(kind).partition("\n")[0], str(kind.exit_code))
        stdout().print(rows)
