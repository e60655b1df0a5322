"""The documentation site: `nox -s docs` builds it, and a warning is an error."""

from __future__ import annotations

import sys
from pathlib import Path

import bridge

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "nemotron-bridge"
author = "the nemotron-bridge authors"
version = release = bridge.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "commands",
    "drawings",
    "errors_page",
]
exclude_patterns = ["_ext", "evidence"]
html_theme = "furo"
html_title = "nemotron-bridge"
html_static_path = ["_static"]
html_css_files = ["drawings.css"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_use_rtype = False

default_role = "code"  # single backticks in docstrings
smartquotes = False  # --flags keep their dashes
pygments_style = "friendly"
