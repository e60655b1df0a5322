"""`{errors}`: every error code, from the docstring that `nemotron-bridge explain` prints."""

from __future__ import annotations

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Errors(SphinxDirective):
    """Lists the errors of the project, one section each."""

    def run(self) -> list[nodes.Node]:
        """Parse the explanations as Markdown."""
        from harness.cli_explain import error_kinds, explanation

        lines: list[str] = []
        for code, kind in error_kinds().items():
            first, _, rest = explanation(kind).partition("\n")
            lines += [f"## {code}", "", f"**{first}** Exit code {kind.exit_code}.", rest, ""]
        container = nodes.section()
        text = StringList("\n".join(lines).splitlines(), source="nemotron-bridge explain")
        self.state.nested_parse(text, 0, container, match_titles=1)
        return container.children


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("errors", Errors)
    return {"parallel_read_safe": True}
