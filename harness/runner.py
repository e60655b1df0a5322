"""Run cases, one isolated from the next, and count honestly."""

from __future__ import annotations

import errno
import logging
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from bridge.errors import BridgeError
from harness.bench import BASE_LAYOUT, Bench
from harness.checks import CHECKS
from harness.compare import Finding
from harness.errors import RanksUnavailableError, ReferenceUnavailableError
from harness.suite import LAYERS, Case, forms_ranks

logger = logging.getLogger(__name__)

Status = Literal["passed", "failed", "error", "not run"]
GPU: Final = "gpu"
"""Why a case is left out that needs a GPU where torch finds none."""
TRANSFORMER_ENGINE: Final = "transformer-engine"
"""Why one is that needs Transformer Engine's layers where they are not installed, or on a CPU."""
FLASH_ATTENTION: Final = "flash-attn"
"""Why one is that needs that package."""
RANKS: Final = "ranks"
"""Why a case is left out whose layout has more ranks than torchrun has started."""
NO_REFERENCE: Final = "reference"
"""Why a case is left out that needs the reference model where only files of its logits are."""
STREAMED: Final = "streamed"
"""Why a case is left out that needs the whole model where it is streamed."""
_LACKING: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EROFS, errno.EIO}
)
_FIRST_LAYOUTS: Final = (None, BASE_LAYOUT)
"""No ranks at first, while they start; then the layout that others are compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One case and what became of it.

    Args:
        case: The case.
        status: "error" is a check that could not be carried out; "not run" one that was not tried.
        finding: What the check found; None without one.
        reason: Why it did not run, or the error in one line.
        traceback: Of an error that is nobody's deliberate refusal.
        seconds: Wall-clock time, shared inputs included where this case was the first to need them.
        machine_lacked: The error is this machine's, which had no memory or room: it says nothing
            of what was checked.
    """

    case: Case
    status: Status
    finding: Finding | None = None
    reason: str = ""
    traceback: str = ""
    seconds: float = 0.0
    machine_lacked: bool = False

    @property
    def summary(self) -> str:
        """One line."""
        return self.finding.summary if self.finding is not None else self.reason


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """All results of a run, in the order they were made."""

    results: Sequence[Result]
    seconds: float
    allowed_not_run: Collection[str] = field(default_factory=frozenset)

    def count(self, status: Status) -> int:
        """Number of cases that ended so."""
        return sum(result.status == status for result in self.results)

    @property
    def count_line(self) -> str:
        """`41 passed, 0 failed, 6 not run (gpu)`: nothing is hidden and nothing rounded up."""
        parts = [f"{self.count('passed')} passed", f"{self.count('failed')} failed"]
        if self.count("error"):
            errors = self.count("error")
            parts.append(f"{errors} error{'s' if errors > 1 else ''}")
        left = [result.reason for result in self.results if result.status == "not run"]
        parts += [f"{left.count(reason)} not run ({reason})" for reason in dict.fromkeys(left)]
        return ", ".join(parts)

    @property
    def exit_code(self) -> int:
        """0 all passed, 1 a check failed, 3 something could not be carried out."""
        if self.count("failed"):
            return 1
        skipped = any(
            result.status == "not run" and result.reason not in self.allowed_not_run
            for result in self.results
        )
        return 3 if self.count("error") or skipped or not self.count("passed") else 0


def in_running_order(cases: Iterable[Case]) -> list[Case]:
    """By layers and layout, so that ranks and groups are formed rarely; then by model."""
    ordered = list(cases)
    layouts = list(dict.fromkeys(_group(case) for case in ordered))
    models = list(dict.fromkeys(case.model for case in ordered))
    checks = list(CHECKS)

    def key(case: Case) -> tuple[object, ...]:
        group = _group(case)
        first = _FIRST_LAYOUTS.index(group) if group in _FIRST_LAYOUTS else len(_FIRST_LAYOUTS)
        return (
            case.device,
            LAYERS.index(case.layers),
            first,
            layouts.index(group),
            models.index(case.model),
            case.dtype,
            checks.index(case.check),
            case.probe or "",
        )

    return sorted(ordered, key=key)


def _group(case: Case) -> str | None:
    return case.layout if forms_ranks(case.check) else None


def run_cases(
    cases: Iterable[Case],
    bench: Bench,
    *,
    on_result: Callable[[Result], None] = lambda _result: None,
    allowed_not_run: Collection[str] = (),
) -> RunReport:
    """Run cases in the order of `in_running_order`.

    Args:
        cases: At least one; selecting none is the caller's error.
        bench: What they share.
        on_result: Called after each case.
        allowed_not_run: Reasons for which a case may be left out without an exit code of 3.
    """
    started = time.monotonic()
    ordered = in_running_order(cases)
    if any(case.device == "cpu" and _group(case) is not None for case in ordered):
        bench.warm_up("cpu")  # Megatron-Core is imported while other cases run
    results = []
    for case in ordered:
        result = run_case(case, bench)
        logger.info("%s: %s, %s (%.1f s)", case.id, result.status, result.summary, result.seconds)
        results.append(result)
        on_result(result)
    return RunReport(
        results=results, seconds=time.monotonic() - started, allowed_not_run=set(allowed_not_run)
    )


def run_case(case: Case, bench: Bench) -> Result:
    """Run one case; whatever happens in it stays in its result."""
    missing = _unavailable(case)
    if missing is not None:
        return Result(case=case, status="not run", reason=missing)
    if not bench.can_answer(case):
        return Result(case=case, status="not run", reason=STREAMED)
    started = time.monotonic()
    try:
        finding = CHECKS[case.check].run(case, bench.answering(case))
    except (RanksUnavailableError, ReferenceUnavailableError) as error:
        reason = RANKS if isinstance(error, RanksUnavailableError) else NO_REFERENCE
        return Result(
            case=case, status="not run", reason=reason, traceback=str(error),
            seconds=time.monotonic() - started,
        )  # fmt: skip
    except BridgeError as error:
        notes = getattr(error, "__notes__", [])
        reason = str(error).splitlines()[0]
        text = "\n".join([str(error), *notes])
        return Result(
            case=case, status="error", reason=reason, traceback=text,
            seconds=time.monotonic() - started, machine_lacked=_machine_lacked(error),
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - one broken case must not cost the others
        return Result(
            case=case,
            status="error",
            reason=traceback.format_exception_only(error)[-1].strip(),
            traceback=traceback.format_exc(),
            seconds=time.monotonic() - started,
            machine_lacked=_machine_lacked(error),
        )
    return Result(
        case=case,
        status="passed" if finding.passed else "failed",
        finding=finding,
        seconds=time.monotonic() - started,
    )


def _machine_lacked(error: BaseException) -> bool:
    """Whether an error, or what it was made of, is one that no input and no code under test makes.

    A file that is missing, torn or unreadable is none: that a damaged checkpoint leads to.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        if isinstance(link, MemoryError) or (isinstance(link, OSError) and link.errno in _LACKING):
            return True
        seen.add(id(link))
        link = link.__cause__ or link.__context__
    return False


def _unavailable(case: Case) -> str | None:
    """What a case lacks here, in one word; None when nothing."""
    import importlib.util

    if case.device != "cpu":
        import torch

        if not torch.cuda.is_available():
            return GPU
    if case.layers != "local":
        if case.device == "cpu" or importlib.util.find_spec("transformer_engine") is None:
            return TRANSFORMER_ENGINE
        if case.layers == "te-flash" and importlib.util.find_spec("flash_attn") is None:
            return FLASH_ATTENTION
    return None
