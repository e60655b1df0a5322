"""What CI installs is pinned by hash, complete, licensed, and refused where a hash is wrong."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
import tomllib
import warnings
import zipfile
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LISTS = ("constraints.txt", "wheel.txt", "nox.txt", "cpu.txt", "cuda.txt", "sbom.txt")


@cache
def script(path: str) -> ModuleType:
    """A file of the repository that is no part of a package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        # nox knows its sessions by name, and another test may have read them.
        warnings.simplefilter("ignore", FutureWarning)
        spec.loader.exec_module(module)
    return module


@cache
def pins(listed: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Name to version and hashes, read line by line, as little as pip has to understand."""
    found: dict[str, tuple[str, frozenset[str]]] = {}
    name, number, hashes = "", "", set[str]()
    text = (ROOT / ".ci" / listed).read_text(encoding="utf-8")
    for line in [*text.splitlines(), "end==0"]:
        if pinned := re.fullmatch(r"([a-z0-9-]+)==([^ ]+)( \\)?", line):
            if name:
                found[name] = (number, frozenset(hashes))
            name, number, hashes = pinned[1], pinned[2], set()
        elif one := re.fullmatch(r" {4}--hash=(sha256:[0-9a-f]{64})( \\)?", line):
            hashes.add(one[1])
        else:
            assert line.lstrip().startswith("#"), line
    return found


@cache
def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def normal(name: str) -> str:
    """A distribution's name as an index spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("listed", LISTS)
def test_every_pin_has_a_hash_and_no_list_is_empty(listed: str) -> None:
    """`==`, and at least one sha256; any other kind of line fails in `pins`."""
    assert len(pins(listed)) > 10 or listed == "cpu.txt"
    assert [name for name, (_, hashes) in pins(listed).items() if not hashes] == []


def test_the_lists_agree() -> None:
    """What two lists have is the same in both; wheel and nox are parts, CUDA's is none."""
    full = pins("constraints.txt")
    for listed in ("wheel.txt", "nox.txt"):
        assert pins(listed).items() <= full.items()
    assert not pins("cuda.txt").keys() & full.keys()
    assert "nox" in pins("nox.txt")
    ((name, (build, _)),) = pins("cpu.txt").items()
    assert (name, build.partition("+")[0]) == ("torch", full["torch"][0])
    assert build.endswith("+cpu")


def in_the_wake(roots: list[Requirement]) -> dict[str, list[str]]:
    """Every name that requirements need here, by installed metadata; which versions they allow."""
    wanted: dict[str, list[str]] = {}
    seen, queue = set[str](), list(roots)
    while queue:
        one = queue.pop()
        if str(one) in seen:
            continue
        seen.add(str(one))
        name = normal(one.name)
        wanted.setdefault(name, []).append(str(one.specifier))
        for line in requires(name) or ():
            further = Requirement(line)
            extras = [*one.extras, ""]
            if not further.marker or any(further.marker.evaluate({"extra": e}) for e in extras):
                queue.append(further)
    return wanted


@pytest.mark.parametrize(("listed", "extras"), [("constraints.txt", {"dev"}), ("wheel.txt", set())])
def test_all_that_the_project_needs_is_pinned_within_its_range(
    listed: str, extras: set[str]
) -> None:
    """Dependencies and theirs, extras and the build backend: `--no-deps` leaves nothing out."""
    tables = project()["project"]
    lines = [*tables["dependencies"]]
    if extras:
        optional = tables["optional-dependencies"]
        own = [line for extra in ("dev", "docs", "test", "png") for line in optional[extra]]
        lines += [line for line in own if not line.startswith("nemotron-bridge")]
        lines += project()["build-system"]["requires"]
    roots = [Requirement(line) for line in lines]
    missing = []
    for name, ranges in in_the_wake([one for one in roots if installed(one.name)]).items():
        found = (pins(listed) | pins("cuda.txt")).get(name)
        if found is None or not all(
            Requirement(f"x{one}").specifier.contains(found[0], prereleases=True) for one in ranges
        ):
            missing.append((name, ranges, found))
    assert missing == []
    assert {normal(one.name) for one in roots} <= pins(listed).keys()


def installed(name: str) -> bool:
    """Whether a distribution is here."""
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def test_what_is_installed_here_is_what_is_pinned() -> None:
    """The environment that these tests run in is the one that CI built."""
    here = {name: version(name).partition("+")[0] for name in pins("wheel.txt") if installed(name)}
    if here["torch"] != pins("wheel.txt")["torch"][0]:
        pytest.skip("an environment that somebody else made, with a torch of its own")
    assert here.keys() == pins("wheel.txt").keys()


def pip_takes(tmp_path: Path, line: str) -> subprocess.CompletedProcess[str]:
    """What pip says to a list, by the very flags of nox's environment, of an empty directory."""
    listed = tmp_path / "listed.txt"
    listed.write_text(f"{line}\n", encoding="utf-8")
    flags: tuple[str, ...] = script("noxfile.py").LISTED
    done = subprocess.run(  # noqa: S603 (pip of this environment)
        [sys.executable, *flags, str(listed), "--target", str(tmp_path / "site"), "--no-cache-dir"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode and "hash" not in done.stderr.lower():
        pytest.skip(f"no package index is reached from here: {done.stderr.splitlines()[-1]}")
    return done


def test_pip_takes_the_right_file_and_refuses_any_other(tmp_path: Path) -> None:
    """A small package with the hashes on record, with another, and with none."""
    number, hashes = pins("constraints.txt")["iniconfig"]
    pin = f"iniconfig=={number}"
    right = pip_takes(tmp_path, " ".join([pin, *(f"--hash={one}" for one in hashes)]))
    assert right.returncode == 0, right.stderr
    assert (tmp_path / "site" / "iniconfig").is_dir()

    wrong = tmp_path / "wrong"
    wrong.mkdir()
    done = pip_takes(wrong, f"{pin} --hash=sha256:{'0' * 64}")
    assert done.returncode == 1
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert not (wrong / "site" / "iniconfig").exists()

    none = tmp_path / "none"
    none.mkdir()
    done = pip_takes(none, pin)
    assert done.returncode == 1
    assert "Hashes are required" in done.stderr


BLOCK = """\
torch==2.13.0 \\
    --hash=sha256:{a} \\
    --hash=sha256:{b}
    # via nemotron-bridge (pyproject.toml)
triton==3.7.1 \\
    --hash=sha256:{a}
    # via torch
""".format(a="a" * 64, b="b" * 64)


def test_entries_are_told_apart_and_sorted_into_lists() -> None:
    """Each with its hashes and comments; CUDA's libraries in no list but their own."""
    lock = script(".ci/lock.py")
    entries = lock.blocks(BLOCK)
    assert list(entries) == ["torch", "triton"]
    assert "".join(entries.values()) == BLOCK
    written = lock.texts(entries, {"wheel.txt": {"torch", "triton"}})
    assert "triton" not in lock.blocks(written["wheel.txt"])
    assert list(lock.blocks(written["cuda.txt"])) == ["triton"]


def test_a_build_that_no_index_has_is_pinned_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own version and hash where pip finds one; else it stays while its pin does."""
    lock = script(".ci/lock.py")
    builder = "Wheel-Version: 1.0\nGenerator: here\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    links = tmp_path / "links"
    links.mkdir()
    for one in ("1.0", "1.0+cpu"):
        with zipfile.ZipFile(links / f"nemo_nothing-{one}-py3-none-any.whl", "w") as wheel:
            info = f"nemo_nothing-{one}.dist-info"
            about = f"Metadata-Version: 2.1\nName: nemo-nothing\nVersion: {one}\n"
            wheel.writestr(f"{info}/METADATA", about)
            wheel.writestr(f"{info}/WHEEL", builder)
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    local = links / "nemo_nothing-1.0+cpu-py3-none-any.whl"
    digest = hashlib.sha256(local.read_bytes()).hexdigest()
    entry = f"nemo-nothing==1.0+cpu \\\n    --hash=sha256:{digest}\n"
    assert entry == lock.local_build("nemo-nothing==1.0", "")

    local.unlink()
    assert entry == lock.local_build("nemo-nothing==1.0", f"# a head\n{entry}")
    assert not lock.local_build("nemo-nothing==1.0", entry.replace("1.0+", "1.1+"))


def test_uv_resolves_with_hashes_and_keeps_what_fits(tmp_path: Path) -> None:
    """An older pin stays unless it is to be upgraded; wheels only."""
    if not installed("uv"):
        pytest.skip("uv is not installed here")
    lock = script(".ci/lock.py")
    source = tmp_path / "requirements.in"
    source.write_text("iniconfig\n", encoding="utf-8")
    try:
        kept = lock.resolved(str(source), keep="iniconfig==2.0.0\n", upgrade=False)
    except subprocess.CalledProcessError:
        pytest.skip("no package index is reached from here")
    assert lock.pin_of(lock.blocks(kept)["iniconfig"]) == "iniconfig==2.0.0"
    assert "--hash=sha256:" in kept
    newer = lock.resolved(str(source), keep="iniconfig==2.0.0\n", upgrade=True)
    assert lock.pin_of(lock.blocks(newer)["iniconfig"]) != "iniconfig==2.0.0"


def licences() -> list[list[str]]:
    """The rows of the page: name, version, licence, why."""
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (?:\[([^\]]+)\]\([^)]+\)|([a-z0-9-]+)) \| (.*) \| (.*) \| (.*) \|$",
        page,
        flags=re.MULTILINE,
    )
    return [
        [linked or plain, *rest] for linked, plain, *rest in rows if plain not in {"package", "---"}
    ]


def test_every_pin_has_a_licence_and_a_reason_on_the_page() -> None:
    """Each once, at its version, and no package that is not pinned."""
    pinned = pins("constraints.txt") | pins("cuda.txt")
    rows = licences()
    assert sorted((name, number) for name, (number, _) in pinned.items()) == sorted(
        (name, number) for name, number, *_ in rows
    )
    for name, _, licence, why in rows:
        assert licence.strip(), name
        assert not re.search("unknown|unlicen[cs]ed", licence, flags=re.IGNORECASE), name
        assert re.fullmatch(r"in the wake of [a-z].*|(?!in the wake).+", why), name


def test_the_page_says_what_the_packages_say() -> None:
    """What is installed at the pinned version names the very licence of its row."""
    writer = script(".ci/licences.py")
    on_page = {name: (number, licence) for name, number, licence, _ in licences()}
    compared = 0
    for name, (number, licence) in on_page.items():
        if installed(name) and version(name).partition("+")[0] == number:
            assert licence == writer.licence_of(distribution(name).metadata, name)
            compared += 1
    assert compared > 20


def test_run_time_is_told_from_development() -> None:
    """The page's first table is what the wheel needs, its last what a GPU's torch adds."""
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    first, second, last = (
        set(re.findall(r"^\| \[?([a-z0-9-]+)", part, flags=re.MULTILINE)) - {"package", "---"}
        for part in page.split("\n## ")[1:]
    )
    assert first == pins("wheel.txt").keys()
    assert first | second == pins("constraints.txt").keys()
    assert last == pins("cuda.txt").keys()


def test_a_package_without_a_licence_ends_it() -> None:
    """Nor does UNKNOWN pass for one."""
    from email.message import Message

    about = Message()
    about["License"] = "UNKNOWN"
    with pytest.raises(LookupError, match="nameless"):
        script(".ci/licences.py").licence_of(about, "nameless")
    about["Classifier"] = "License :: OSI Approved :: MIT License"
    assert script(".ci/licences.py").licence_of(about, "nameless") == "MIT License"


def test_direct_dependencies_have_reasons_of_their_own() -> None:
    """And no reason is left of a dependency that is gone."""
    tables = project()["project"]
    lines = [*tables["dependencies"], *tables["optional-dependencies"]["dev"]]
    lines += [*tables["optional-dependencies"]["docs"], *tables["optional-dependencies"]["test"]]
    lines += tables["optional-dependencies"]["png"]
    direct = {normal(Requirement(line).name) for line in lines} - {"nemotron-bridge"}
    assert direct == script(".ci/licences.py").WHY.keys()
