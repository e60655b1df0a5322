"""That all processes of a crew are about to do the same thing: asked before anything is written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from bridge import __version__
from bridge.crew.protocol import Crew
from bridge.errors import DisagreementError
from bridge.storage.source import FileLayout

if TYPE_CHECKING:  # which shares its work by a crew itself
    from bridge.conversion_job import ConversionJob

_SHOWN: Final = 12
"""Hex digits of a digest that are shown."""


def agree_on_conversion(job: ConversionJob, files: Sequence[FileLayout], source: object) -> None:
    """`agree` on what a conversion comes from, what it writes, and how.

    Args:
        job: About to begin.
        files: The target's, of all processes.
        source: What identifies the source: names, shapes and places of its tensors.
    """
    options = job.options
    agree(
        job.crew,
        {
            "direction": job.direction,
            "--dtype": options.dtype,
            "--verify": options.verify,
            "--overwrite": options.overwrite,
            "--allow-overflow": options.allow_overflow,
            "--carry-field": sorted(options.carry),
            "plan": job.plan.digest(),
            "target's files": files,
            "source": source,
        },
    )


def agree(crew: Crew, facts: Mapping[str, object]) -> None:
    """Hold what this process is about to do against what the others are.

    Every process of the crew makes this call. The version of the bridge is compared, too.

    Args:
        crew: Who is asked; one alone agrees.
        facts: What it depends on, by what a user calls it. Objects are compared by their `repr`,
            which must not depend on the process, and long ones are shown as a digest.

    Raises:
        DisagreementError: BR502, with every fact that differs from rank 0's, rank by rank.
    """
    if crew.size == 1:
        return
    told = crew.gather({"nemotron-bridge": __version__} | {k: _word(v) for k, v in facts.items()})
    odd = [
        f"rank {rank}: {name} {found.get(name, 'none')}, rank 0 has {told[0].get(name, 'none')}"
        for rank, found in enumerate(told)
        for name in _union(told[0], found)
        if found.get(name) != told[0].get(name)
    ]
    if odd:
        raise DisagreementError(
            f"the {crew.size} processes are not about to do the same; nothing was written",
            where=odd,
            hint="give all of them the same command, the same source and the same software",
        )


def _word(fact: object) -> str:
    text = fact if isinstance(fact, str) else repr(fact)
    if len(text) <= 2 * _SHOWN:
        return text
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:_SHOWN]}"


def _union(one: Mapping[str, str], other: Mapping[str, str]) -> Sequence[str]:
    return list(dict.fromkeys([*one, *other]))
