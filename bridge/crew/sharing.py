"""Dividing work over a crew, and the one target that all of it goes to."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from bridge.crew.protocol import Crew
from bridge.errors import WorkerLostError
from bridge.storage.journal import Job
from bridge.storage.new_checkpoint import NewCheckpoint, new_checkpoint
from bridge.storage.remote import Location

Item = TypeVar("Item")


def share_of(crew: Crew, items: Sequence[Item], sizes: Sequence[int]) -> list[Item]:
    """The items that this process works on, in their order; every process has others.

    Args:
        crew: Who divides.
        items: All of them, the same on every process.
        sizes: Bytes of each.
    """
    return [items[index] for index in balanced(sizes, crew.size)[crew.rank]]


def balanced(sizes: Sequence[int], num_shares: int) -> list[list[int]]:
    """Deal indices out so that the shares' sums of `sizes` come out about equal.

    The largest goes first, each to the smallest share so far; equal ones by index, so that the same
    sizes always give the same shares. Each share is in ascending order; some may be empty.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [(0, number) for number in range(num_shares)]
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        load, number = heapq.heappop(loads)
        shares[number].append(index)
        heapq.heappush(loads, (load + sizes[index], number))
    return [sorted(share) for share in shares]


@contextmanager
def shared_checkpoint(
    target: Location,
    *,
    overwrite: bool,
    last: Sequence[str],
    staging: Path | None = None,
    job: Job | None = None,
    crew: Crew,
) -> Iterator[NewCheckpoint]:
    """`new_checkpoint` for a crew: rank 0 creates it and makes it visible, all fill it.

    A failure of any process stops all of them before rank 0 removes what was built, or leaves it
    for the next attempt.

    Raises:
        TargetExistsError: BR304, the target exists and is not an empty directory.
        ResumeError: BR306, what an earlier attempt has left cannot be gone on with.
        CheckpointError: BR300, the system or the backend refuses.
    """
    found: NewCheckpoint | None = None
    if crew.rank:
        found = crew.gather(found)[0]
        if found is None:
            raise AssertionError("rank 0 has no target")
        yield found
        crew.gather(None)  # the error, if placing it fails
        return
    with new_checkpoint(target, overwrite=overwrite, staging=staging, last=last, job=job) as found:
        try:
            crew.gather(found)
            yield found
        except BaseException as error:
            told = crew.settle(error)
            if told is error:
                raise
            raise told from error
    with suppress(WorkerLostError):  # whoever dies now takes nothing along: the target is complete
        crew.gather(None)
