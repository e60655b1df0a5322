"""Writes the lists of what CI installs: every pin, with the sha256 of each file it may come as.

`nox -s constraints` runs it. uv resolves for the oldest Python and the platforms below, keeps the
pins that still fit (`--upgrade` renews them), and takes the hashes that the index publishes.
Wheels only: an sdist would run its build, unhashed, on the machine that installs it.

What it writes, in this directory:
    constraints.txt: all that the sessions need, the build backend included.
    wheel.txt: the part of it that our wheel needs at run time.
    nox.txt: the part of it that nox itself needs.
    cuda.txt: what the index's torch wants beside them on Linux, and a CPU build of it does not.
    sbom.txt: what `nox -s sbom` needs, in an environment of its own.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
PYTHONS: Final = ("3.11", "3.12")
PLATFORMS: Final = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28")
CUDA: Final = re.compile(r"(cuda|nvidia)-|triton$")
HASH: Final = re.compile(r"--hash=(sha256:[0-9a-f]{64})")
FILES: Final = {
    "constraints.txt": "What CI installs: a pin, and the sha256 of each file it may come as.",
    "wheel.txt": "The part of constraints.txt that the wheel needs at run time.",
    "nox.txt": "The part of constraints.txt that nox needs; .ci/run and the README install it.",
    "cuda.txt": "What torch from the package index needs on Linux, and a CPU build does not.",
    "sbom.txt": "What `nox -s sbom` needs.",
}


def blocks(text: str) -> dict[str, str]:
    """The entries of a requirements file: name to its lines, pin, hashes and comments."""
    parts = re.split(r"^(?=[a-z0-9][a-z0-9-]*==)", text, flags=re.MULTILINE)
    return {part.partition("==")[0]: part for part in parts[1:]}


def pin_of(block: str) -> str:
    """`name==version` of an entry."""
    return re.split(r"[\s;\\]", block, maxsplit=1)[0]


def with_hashes(block: str, more: set[str]) -> str:
    """An entry that allows further files, each `sha256:...`."""
    new = sorted(more - set(HASH.findall(block)))
    first = f"{pin_of(block)} \\\n"
    return block.replace(first, first + "".join(f"    --hash={one} \\\n" for one in new), 1)


def resolved(
    *inputs: str, keep: str, python: str = PYTHONS[0], platform: str = PLATFORMS[0], upgrade: bool
) -> str:
    """What uv makes of requirements, for one Python and platform, as a requirements file.

    Args:
        inputs: uv's arguments that name them.
        keep: A requirements file whose pins stay where they fit.
        python: Its version, the oldest of that minor one.
        platform: By uv's name.
        upgrade: Whether newer versions replace `keep`'s.
    """
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "output.txt"
        output.write_text(keep, encoding="utf-8")
        subprocess.run(  # noqa: S603 (uv of this environment)
            [
                *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-config"),
                *("--no-header", "--generate-hashes", "--only-binary", ":all:"),
                *("--python-version", python, "--python-platform", platform),
                *("--output-file", str(output), *(["--upgrade"] if upgrade else []), *inputs),
            ],
            cwd=HERE.parent,
            check=True,
        )
        return output.read_text(encoding="utf-8")


def builds_here(pin: str) -> set[str]:
    """The hash of the file that this machine's pip takes for a pin.

    torch for the CPU alone is on no index: pip finds it where its configuration says so, by
    `find-links`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        pip = (sys.executable, "-m", "pip")
        quiet = ("--quiet", "--disable-pip-version-check", "--no-deps")
        subprocess.run([*pip, "download", *quiet, "--dest", scratch, pin], check=True)  # noqa: S603
        found = subprocess.run(  # noqa: S603
            [*pip, "hash", *map(str, Path(scratch).iterdir())],
            check=True,
            capture_output=True,
            text=True,
        )
    return set(HASH.findall(found.stdout))


def kept_builds(pin: str, before: str) -> set[str]:
    """The hashes that a file has for a pin already: of builds that are found on other machines."""
    block = blocks(before).get(pin.partition("==")[0], "")
    return set(HASH.findall(block)) if block and pin_of(block) == pin else set()


def lock(*, upgrade: bool) -> dict[str, str]:
    """The texts of all files, by name.

    Raises:
        RuntimeError: One list of pins does not do for every Python and platform.
    """
    before = (HERE / "constraints.txt").read_text(encoding="utf-8")
    dev = ("--extra", "dev", "pyproject.toml")
    full = resolved(*dev, keep=before, upgrade=upgrade)
    pins = {pin_of(block) for block in blocks(full).values()}
    for python in PYTHONS:
        for platform in PLATFORMS:
            other = resolved(*dev, keep=full, python=python, platform=platform, upgrade=False)
            if differing := pins ^ {pin_of(block) for block in blocks(other).values()}:
                raise RuntimeError(f"Python {python}, {platform} needs others: {differing}")
    entries = blocks(full)
    torch = pin_of(entries["torch"])
    builds = builds_here(torch) | kept_builds(torch, before)
    entries["torch"] = with_hashes(entries["torch"], builds)
    parts = {
        "wheel.txt": set(blocks(resolved("pyproject.toml", keep=full, upgrade=False))),
        "nox.txt": set(blocks(resolved_of("nox", keep=full))),
    }
    sbom = blocks(resolved_of("cyclonedx-bom", keep=full + (HERE / "sbom.txt").read_text("utf-8")))
    return texts(entries, parts) | {"sbom.txt": text_of("sbom.txt", sbom, sbom)}


def resolved_of(requirement: str, *, keep: str) -> str:
    """`resolved`, of one requirement."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "requirements.in"
        source.write_text(f"{requirement}\n", encoding="utf-8")
        return resolved(str(source), keep=keep, upgrade=False)


def text_of(file: str, entries: Mapping[str, str], names: Iterable[str]) -> str:
    """A file with some of the entries."""
    head = f"# {FILES[file]}\n# `nox -s constraints` writes it.\n"
    return head + "".join(entries[name] for name in sorted(names))


def texts(entries: Mapping[str, str], parts: Mapping[str, set[str]]) -> dict[str, str]:
    """The files, of all entries and the names in those that hold a part of them."""
    cuda = {name for name in entries if CUDA.match(name)}
    names = {file: part - cuda for file, part in parts.items()}
    names |= {"constraints.txt": set(entries) - cuda, "cuda.txt": cuda}
    return {file: text_of(file, entries, part) for file, part in names.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write what CI installs, with hashes.")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    for file, text in lock(upgrade=parser.parse_args().upgrade).items():
        (HERE / file).write_text(text, encoding="utf-8")
