"""The entries of `suites/variants/`: what is known of a published checkpoint, for `--suite`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from harness.errors import SuiteError
from harness.locations import suites_dir
from harness.toml_files import read_toml

SCHEMA_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One published checkpoint.

    Args:
        name: Of the entry, and of the model in case ids.
        description: One line.
        hf_id: On the Hub.
        num_parameters: Published, exact; None where the block list is not public.
        config: Its `config.json`; None where that is not public.
        stand_in: The toy that is qualified in its place where the user brings no configuration.
    """

    name: str
    description: str
    hf_id: str
    num_parameters: int | None = None
    config: Path | None = None
    stand_in: str | None = None


def variants_dir() -> Path:
    """Where the entries are."""
    return suites_dir() / "variants"


def variant_names() -> list[str]:
    """The variants that come with the project."""
    return sorted(path.stem for path in variants_dir().glob("*.toml"))


def load_variant(name: str) -> Variant:
    """Read `suites/variants/NAME.toml`, or a file by its path; `config` is relative to it.

    Raises:
        SuiteError: HN101, no such entry, or one that makes no sense.
    """
    path = Path(name) if name.endswith(".toml") else variants_dir() / f"{name}.toml"
    try:
        document: dict[str, Any] = read_toml(path)
    except FileNotFoundError:
        raise SuiteError(
            f"no variant {name!r}", where=str(path), hint=f"known: {', '.join(variant_names())}"
        ) from None
    except (OSError, ValueError) as error:
        raise SuiteError(f"not a variant: {error}", where=str(path)) from None
    wrong = []
    if document.pop("schema_version", None) != SCHEMA_VERSION:
        wrong.append(f"schema_version must be {SCHEMA_VERSION}")
    kinds = {"description": str, "hf_id": str, "num_parameters": int, "config": str,
             "stand_in": str}  # fmt: skip
    for key, value in document.items():
        if key not in kinds:
            wrong.append(f"unknown key {key}")
        elif type(value) is not kinds[key]:
            wrong.append(f"{key}={value!r} is no {kinds[key].__name__}")
    wrong += [f"{key} is missing" for key in ("description", "hf_id") if key not in document]
    if ("config" in document) == ("stand_in" in document):
        wrong.append("one of config and stand_in must say what is qualified")
    if wrong:
        raise SuiteError("a variant that makes no sense", where=[f"{path}: {one}" for one in wrong])
    config = document.pop("config", None)
    return Variant(
        name=path.stem, config=None if config is None else path.parent / config, **document
    )
