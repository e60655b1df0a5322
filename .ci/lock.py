"""Writes the lists of what CI installs: every pin, with the sha256 of each file it may come as.

`nox -s constraints` runs it. uv resolves for the oldest Python and the platforms below, keeps the
pins that still fit (`--upgrade` renews them), and takes the hashes that the index publishes.
Wheels only: an sdist would run its build, unhashed, on the machine that installs it.

What it writes, in this directory:
    constraints.txt: all that the sessions need, the build backend included.
    wheel.txt: the part of it that our wheel needs at run time.
    nox.txt: the part of it that nox itself needs.
    cpu.txt: torch's build for the CPU alone, which no index has: taken first, where pip finds it.
    cuda.txt: what the index's torch wants beside them on Linux, and that build does not.
    sbom.txt: what `nox -s sbom` needs, in an environment of its own.
"""

from __future__ import annotations

import argparse
import hashlib
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
FILES: Final = {
    "constraints.txt": "What CI installs: a pin, and the sha256 of each file it may come as.",
    "wheel.txt": "The part of constraints.txt that the wheel needs at run time.",
    "nox.txt": "The part of constraints.txt that nox needs; .ci/run and the README install it.",
    "cpu.txt": "torch for the CPU alone: on no index, taken where pip's configuration finds it.",
    "cuda.txt": "What torch from the package index needs on Linux, and that for the CPU does not.",
    "sbom.txt": "What `nox -s sbom` needs.",
}


def blocks(text: str) -> dict[str, str]:
    """The entries of a requirements file: name to its lines, pin, hashes and comments."""
    parts = re.split(r"^(?=[a-z0-9][a-z0-9-]*==)", text, flags=re.MULTILINE)
    return {part.partition("==")[0]: part for part in parts[1:]}


def pin_of(block: str) -> str:
    """`name==version` of an entry."""
    return re.split(r"[\s;\\]", block, maxsplit=1)[0]


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


def local_build(pin: str, before: str) -> str:
    """The entry of a build that no index has, such as torch's for the CPU alone.

    Args:
        pin: `name==version`, without the build.
        before: The list as it is, of which an entry stays on a machine without such a build.

    Returns:
        The entry for the file that pip finds where its configuration says so, by `find-links`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        pip = (sys.executable, "-m", "pip")
        quiet = ("--quiet", "--disable-pip-version-check", "--no-deps")
        subprocess.run([*pip, "download", *quiet, "--dest", scratch, pin], check=True)  # noqa: S603
        (file,) = Path(scratch).iterdir()
        version = file.name.split("-")[1]
        if "+" in version:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            name = pin.partition("==")[0]
            return f"{name}=={version} \\\n    --hash=sha256:{digest}\n"
    return "".join(
        entry for entry in blocks(before).values() if pin_of(entry).partition("+")[0] == pin
    )


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
    parts = {
        "wheel.txt": set(blocks(resolved("pyproject.toml", keep=full, upgrade=False))),
        "nox.txt": set(blocks(resolved_of("nox", keep=full))),
    }
    sbom = blocks(resolved_of("cyclonedx-bom", keep=full + (HERE / "sbom.txt").read_text("utf-8")))
    cpu = {"torch": local_build(pin_of(entries["torch"]), (HERE / "cpu.txt").read_text("utf-8"))}
    return texts(entries, parts) | {
        "sbom.txt": text_of("sbom.txt", sbom, sbom),
        "cpu.txt": text_of("cpu.txt", cpu, cpu),
    }


def resolved_of(requirement: str, *, keep: str) -> str:
    """`resolved`, of one requirement."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "requirements.in"
        source.write_text(f"{requirement}\n", encoding="utf-8")
        # uv notes where a requirement came from; that file is gone in a moment.
        text = resolved(str(source), keep=keep, upgrade=False)
        return text.replace(f"-r {source}", "nox")


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
