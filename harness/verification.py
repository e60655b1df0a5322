"""What `verify` does to one checkpoint: which checks apply, on which probes, by which reference."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bridge.errors import UsageError
from harness.checks import CHECKS

if TYPE_CHECKING:
    from bridge.spec import ModelSpec
    from harness.bench import Subject
    from harness.suite import Case, Compute

CHECK_NAMES: Final = tuple(name for name in CHECKS if name != "golden")
"""Goldens are of the project's own models."""
CONVERSION_CHECKS: Final = ("config", "round_trip", "placement", "rope", "logits")
"""What proves a conversion that has just been made; the others are about the model anywhere."""
_BASE: Final = "tp1-pp1"


def checks_named(given: str | None) -> tuple[str, ...]:
    """The checks asked for, comma-separated; all of them by default.

    Raises:
        UsageError: BR001, no such check, or none at all.
    """
    if given is None:
        return CHECK_NAMES
    names = tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    unknown = [name for name in names if name not in CHECK_NAMES]
    if unknown or not names:
        raise UsageError(
            f"no check is called {', '.join(unknown)}" if unknown else "--checks names no check",
            hint=f"known: {', '.join(CHECK_NAMES)}",
        )
    return names


def verification_cases(
    model: str,
    *,
    checks: Collection[str],
    layouts: Sequence[str],
    compute: Compute,
    has_input: bool = False,
) -> list[Case]:
    """Every case of these checks that says something of one checkpoint."""
    from harness.probes import INPUT_PROBE
    from harness.suite import PROBES

    probes = (*PROBES, INPUT_PROBE) if has_input else PROBES
    cases = []
    for name in (one for one in CHECK_NAMES if one in checks):
        axes = CHECKS[name].axes
        places: Sequence[str | None] = [
            layout for layout in layouts if name != "layouts" or layout != _BASE
        ]
        if name == "round_trip":
            places = [_BASE]  # how the files of our own conversion are cut; no ranks are formed
        cases += [
            compute.case(name, model, layout=layout, probe=probe)
            for layout in (places if "layout" in axes else [None])
            for probe in (probes if "probe" in axes else [None])
        ]
    return cases


def with_input(subject: Subject, path: Path, spec: ModelSpec) -> Subject:
    """The model with a probe of the user's own.

    Raises:
        BridgeError: BR300 or BR104, a file that is none.
    """
    from harness.logits_file import as_probe, read_input

    as_probe(read_input(path), spec)  # bad input, said before any work
    return replace(subject, input=path)


def with_references(
    subject: Subject, paths: Sequence[Path], spec: ModelSpec, *, dtype: str
) -> Subject:
    """The model with logits that stand for its reference's.

    Raises:
        DetachedReferenceError: HN104, logits of anything else.
    """
    from bridge.hf_config import load_hf_config
    from harness.detached import check_weights, match_references, read_reference
    from harness.logits_file import as_probe, hash_hf_weights, read_input
    from harness.probes import probes

    if subject.hf is None:
        raise ValueError(f"{subject.name} is a toy: it has no files")
    known = list(probes(spec.vocab_size, max_position_embeddings=spec.max_position_embeddings))
    if subject.input is not None:
        known.append(as_probe(read_input(subject.input), spec))
    files = [read_reference(path) for path in paths]
    found = match_references(
        files, spec=spec, config=load_hf_config(subject.hf), dtype=dtype, probes=known
    )
    check_weights(files, hash_hf_weights(subject.hf))
    return replace(subject, references=found)
