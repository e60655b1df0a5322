"""What a conversion is told, and what it tells."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bridge.progress import Progress, Silent
from bridge.reading import TransferLimits

Verify = Literal["auto", "none"]
DtypeName = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionOptions:
    """How to convert.

    Args:
        limits: Memory and threads of each process that takes part.
        verify: `auto` reads the target back and compares it with the source bit by bit.
        overwrite: Replace an existing target, once the new one is complete and verified.
        resume: Go on with what an earlier attempt at the same conversion has left.
        carry: Unknown configuration fields to carry along by the caller's word.
        progress: Who watches.
        staging: Where files are built before their upload, for a target behind a URL; None takes
            the system's temporary directory.
        hf_model_id: Of an import: the source's id on the Hub, to be put on record.
        dtype: torch's name of the dtype to write; None writes what is read, byte for byte.
        exact: Refuse a dtype that changes the source's.
        allow_overflow: Let values that are too large for it become infinite.
        follow_links: Read files that are links to somewhere outside their checkpoint.
    """

    limits: TransferLimits = field(default_factory=TransferLimits)
    verify: Verify = "auto"
    overwrite: bool = False
    resume: bool = False
    carry: Collection[str] = ()
    progress: Progress = field(default_factory=Silent)
    staging: Path | None = None
    hf_model_id: str | None = None
    dtype: DtypeName | None = None
    exact: bool = False
    allow_overflow: bool = False
    follow_links: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport:
    """What a conversion did. Sizes in bytes, times in seconds.

    `peak_rss` is the sum of the peaks of all `workers`, which is an upper bound of what they held
    at any one time. What `--verify` adds to the comparison of bits comes after it.
    """

    direction: Literal["hf_to_mcore", "mcore_to_hf"]
    source: str
    target: str
    num_parameters: int
    num_source_tensors: int
    num_target_tensors: int
    nbytes: int
    plan_sha256: str
    verified: bool
    convert_seconds: float
    verify_seconds: float
    workers: int
    peak_rss: int
    rounding: Mapping[str, Any] | None
    """The dtype and the fields of `bridge.casting.Loss`; None where bytes came as they went."""
    tensor_sha256: Mapping[str, str]
    notes: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}
