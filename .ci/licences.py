"""Writes docs/licences.md: every package that is pinned, its licence, and why it is there.

`nox -s licences` runs it. What is installed says its own licence; of the rest (CUDA's libraries on
a machine without) the index is asked for the metadata at the end of a wheel, not for the wheel.
A package that names no licence ends it.
"""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from email.message import Message
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any, Final, NamedTuple

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = ROOT / "docs" / "licences.md"
COPYLEFT: Final = re.compile(r"\b(A?GPL|LGPL|MPL|EPL|EUPL|CDDL)|GNU|Mozilla")
LINKS: Final = ("homepage", "home", "source", "source code", "repository", "code", "github")
UNSAID: Final = {"cuda-toolkit": "none named: a meta-package, which only requires those below"}
"""Of packages that name no licence, what there is to say."""
WHY: Final = {
    "codespell": "spelling, in `nox -s lint`",
    "editables": "hatchling's editable installs",
    "fsspec": "checkpoints behind a URL",
    "furo": "the documentation's theme",
    "hatchling": "builds the wheel",
    "huggingface-hub": "checkpoints of the Hub",
    "hypothesis": "property-based tests",
    "import-linter": "who may import whom, in `nox -s lint`",
    "jinja2": "reports; chat templates",
    "jsonschema": "the schema of evidence",
    "markupsafe": "reports escape what they show",
    "megatron-core": "one of the two sides",
    "mypy": "types, in `nox -s lint`",
    "myst-parser": "the documentation is Markdown",
    "nox": "runs the sessions",
    "numpy": "the oracle; words of tensors",
    "pillow": "`inspect --draw F.png`",
    "psutil": "Megatron-Core saves with it; memory measured",
    "pytest": "tests; the pytest plugin",
    "pytest-timeout": "no test hangs",
    "pytest-xdist": "tests in parallel",
    "pyyaml": "verification cards; NeMo 2's configurations",
    "rich": "tables and progress in a terminal",
    "ruff": "style, in `nox -s lint`",
    "safetensors": "Hugging Face's files",
    "sphinx": "builds the documentation",
    "sphinx-copybutton": "commands of the documentation are copied by a click",
    "tokenizers": "text to tokens",
    "torch": "tensors, the models, ranks",
    "transformers": "the other side",
    "typer": "the command line",
    "types-jsonschema": "types, in `nox -s lint`",
    "types-psutil": "types, in `nox -s lint`",
    "uv": "resolves what CI installs",
    "zlib-ng": "CRC-32 of records at the disk's speed",
}
"""What each package that `pyproject.toml` names is for."""
HEAD: Final = """# Licences

The packages that CI installs (`.ci/constraints.txt`), and what they allow. `nox -s licences` writes
this page from the packages' own metadata; a test holds it to the pins. nemotron-bridge itself is
Apache-2.0 and contains none of them.

**Copyleft:**

{copyleft}

The MPL binds whoever changes its files and passes them on; here they are used as they come.
codespell checks this repository's spelling, and docutils, of which a few files are under the GPL,
helps to build this site: the wheel neither contains nor needs them.
megatron-core names Apache 2.0 in one field of its metadata and a BSD licence in another.
"""
PARTS: Final = {
    "What the wheel needs at run time": "wheel.txt",
    "What development needs besides": "constraints.txt",
    "What torch from the package index needs besides, on Linux": "cuda.txt",
}


class Package(NamedTuple):
    """A pin."""

    name: str
    version: str
    because: tuple[str, ...]
    """The names in whose wake it comes."""


class Row(NamedTuple):
    """What the page says of a package."""

    package: Package
    licence: str
    url: str

    def __str__(self) -> str:
        """A row of the table, in Markdown."""
        package = self.package
        wake = f"in the wake of {', '.join(sorted(package.because) or ['torch'])}"
        why = WHY.get(package.name, wake)
        name = f"[{package.name}]({self.url})" if self.url else package.name
        return f"| {name} | {package.version} | {self.licence} | {why} |"


def pinned(listed: str) -> list[Package]:
    """The entries of a list in `.ci`, by name."""
    text = (ROOT / ".ci" / listed).read_text(encoding="utf-8")
    found = []
    for part in re.split(r"^(?=[a-z0-9][a-z0-9-]*==)", text, flags=re.MULTILINE)[1:]:
        name, version = part.split(maxsplit=1)[0].split("==")
        because = re.findall(r"^ +# +(?:via )?([a-z0-9-]+)\b", part, flags=re.MULTILINE)
        found.append(Package(name, version, tuple(because)))
    names = {one.name for one in found}
    return [one._replace(because=tuple(names.intersection(one.because))) for one in found]


def of_the_index(package: Package) -> Message:
    """The metadata of a package that is not installed, read from the end of one of its wheels."""
    from pip._internal.models.index import PyPI  # pip's own default: no host is named here
    from pip._internal.network.lazy_wheel import dist_from_wheel_url
    from pip._internal.network.session import PipSession

    request = urllib.request.Request(  # noqa: S310 (pip's index, https)
        f"{PyPI.simple_url}/{package.name}/",
        headers={"Accept": "application/vnd.pypi.simple.v1+json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        files = json.load(answer)["files"]
    stem = f"{package.name.replace('-', '_')}-{package.version}-"
    wheels = [file["url"] for file in files if file["filename"].startswith(stem)]
    linux = [url for url in wheels if "manylinux" in url] or wheels
    found: Any = dist_from_wheel_url(package.name, linux[0], PipSession()).metadata
    return found  # type: ignore[no-any-return]


def licence_of(about: Any, name: str) -> str:  # noqa: ANN401 (a mapping with get_all)
    """A package's licence, by its expression, its field or its classifiers, the clearest first.

    Raises:
        LookupError: It names none.
    """
    field = str(about["License"] or "").strip()
    classifiers = [
        line.rpartition(" :: ")[2]
        for line in about.get_all("Classifier") or []
        if line.startswith("License :: ") and not line.endswith("DFSG approved")
    ]
    said = (
        str(about["License-Expression"] or "").strip(),
        field if len(field) < 60 and "\n" not in field and field.upper() != "UNKNOWN" else "",
        ", ".join(classifiers),
        UNSAID.get(name, ""),
    )
    for licence in said:
        if licence:
            return licence.replace("|", "/")
    raise LookupError(f"{name} names no licence")


def url_of(about: Any) -> str:  # noqa: ANN401 (a mapping with get_all)
    """Where a package is at home; empty where it does not say."""
    links: dict[str, str] = {
        label.strip().lower(): url.strip()
        for label, _, url in (line.partition(",") for line in about.get_all("Project-URL") or [])
    }
    for label in LINKS:
        if label in links:
            return links[label]
    return str(about["Home-page"] or "") or next(iter(links.values()), "")


def rows(packages: list[Package]) -> Iterator[Row]:
    """What the page says of each."""
    for package in packages:
        try:
            about: Any = metadata(package.name)
        except PackageNotFoundError:
            about = of_the_index(package)
        if str(about["Version"]).partition("+")[0] != package.version:
            about = of_the_index(package)
        yield Row(package, licence_of(about, package.name), url_of(about))


def page() -> str:
    """The page's text."""
    parts, seen = [], set[str]()
    everything: list[Row] = []
    for title, listed in PARTS.items():
        packages = [one for one in pinned(listed) if one.name not in seen]
        seen |= {one.name for one in packages}
        found = list(rows(packages))
        everything += found
        table = "\n".join(map(str, found))
        head = "| package | version | licence | why |\n| --- | --- | --- | --- |"
        parts.append(f"\n## {title}\n\n{head}\n{table}\n")
    copyleft = [row for row in everything if COPYLEFT.search(row.licence)]
    named = "\n".join(f"- {row.package.name}: {row.licence}" for row in copyleft)
    return HEAD.format(copyleft=named) + "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
