"""`{commands}`: every command with its flags, as the program itself describes them."""

from __future__ import annotations

import inspect
from typing import Any

import typer
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from typer.main import get_command


def _option(parameter: Any, context: typer.Context) -> str:  # noqa: ANN401  # typer has no type for it
    names, described = parameter.get_help_record(context) or (parameter.name, "")
    return f"`{names}`\n: {described}\n"


def _pages(group: Any, prefix: str) -> list[str]:  # noqa: ANN401
    lines: list[str] = []
    for name, command in sorted(group.commands.items()):
        full = f"{prefix} {name}"
        lines += [f"## `{full}`", "", inspect.cleandoc(command.help or ""), ""]
        if hasattr(command, "commands"):
            lines += _pages(command, full)
            continue
        for parameter in command.params:
            if parameter.name != "help":
                lines += [_option(parameter, typer.Context(command))]
    return lines


class Commands(SphinxDirective):
    """Lists the commands of `nemotron-bridge`, one section each."""

    def run(self) -> list[nodes.Node]:
        """Parse what the program says about itself as Markdown."""
        import harness.cli

        text = "\n".join(_pages(get_command(harness.cli.app), "nemotron-bridge"))
        lines = StringList(text.splitlines(), source="nemotron-bridge --help")
        # Sections are allowed: the directive stands at the page's top level.
        container = nodes.section()
        self.state.nested_parse(lines, 0, container, match_titles=1)
        return container.children


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True}
