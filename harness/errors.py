"""Errors of the harness: a suite that makes no sense, and work that could not be done.

A failed check is a result, never one of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bridge.errors import BridgeError
from bridge.visible import visible

_LAYOUT = "\n\t"  # of tracebacks and logs


class HarnessError(BridgeError):
    """A problem of the harness that the user can act on."""

    code = "HN000"


class SuiteError(HarnessError):
    """A suite, a selection or a layout name that cannot be run as written.

    To mend it: `nemotron-bridge parity --list` shows the ids a selection is matched against;
    `suites/README.md` has the format.
    """

    code = "HN101"


class ResumeError(HarnessError):
    """A run that cannot be taken up again: no journal, or one of another run.

    A verdict is taken over only when inputs, versions and limits are the same.

    To mend it: leave `--resume` away, or give another `--report` directory.
    """

    code = "HN102"


class EvidenceError(HarnessError):
    """A file that is no evidence of ours.

    To mend it: give the `evidence.json` or the directory that `--report` has written.
    """

    code = "HN103"


class DetachedReferenceError(HarnessError):
    """A file of logits that is no reference for this model on these inputs.

    Its metadata holds the hashes of configuration, weights and inputs it was made of.

    To mend it: make it anew with `nemotron-bridge logits` from the same checkpoint and probe.
    """

    code = "HN104"


class ReferenceUnavailableError(HarnessError):
    """The reference model cannot be run here, and no file stands in for what is asked of it.

    To mend it: `--reference-logits`, or a check that does not need the reference.
    """

    code = "HN204"
    exit_code = 3


class RanksUnavailableError(HarnessError):
    """A layout of more ranks than torchrun has started.

    To mend it: more processes, or `--layouts` of fewer ranks.
    """

    code = "HN205"
    exit_code = 3


class BackendUnavailableError(HarnessError):
    """A device, or the rank processes that were to use it, cannot be had.

    To mend it: `--device cpu`, or see that torch finds the GPU.
    """

    code = "HN201"
    exit_code = 3


class WorkerFailedError(HarnessError):
    """A rank process threw, died or ran out of time.

    To mend it: the first failing rank's traceback is in the message, each rank's log in the
    directory that it names.

    Args:
        message: What is wrong, one sentence.
        where: Layout and log file.
        hint: What to do about it.
        rank: The rank that failed first.
        rank_traceback: Its traceback, or the stacks of all its threads when it hung.
        log_tails: The last lines each rank wrote, by rank.
    """

    code = "HN202"
    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        where: str | Sequence[str] = (),
        hint: str | None = None,
        rank: int = 0,
        rank_traceback: str = "",
        log_tails: Mapping[int, str] | None = None,
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.rank = rank
        self.rank_traceback = rank_traceback
        self.log_tails = dict(log_tails or {})

    def __str__(self) -> str:
        """The diagnostic, then the first failing rank's traceback, then the logs' ends."""
        parts = [super().__str__()]
        if self.rank_traceback:
            said = visible(self.rank_traceback.rstrip(), keep=_LAYOUT)
            parts.append(f"--- traceback of rank {self.rank}\n{said}")
        parts += [
            f"--- end of the log of rank {rank}\n{visible(tail.rstrip(), keep=_LAYOUT)}"
            for rank, tail in sorted(self.log_tails.items())
            if tail.strip()
        ]
        return "\n".join(parts)

    def __reduce__(self) -> tuple[object, ...]:
        """Survive pickling, everything included."""
        fields = {
            "where": self.where,
            "hint": self.hint,
            "rank": self.rank,
            "rank_traceback": self.rank_traceback,
            "log_tails": self.log_tails,
        }
        return _rebuild, (type(self), self.message, fields)


class WorkerTimeoutError(WorkerFailedError):
    """Ranks that did not finish within the time limit.

    Often ranks that wait for one another: the message holds the stacks of all of them.

    To mend it: `--timeout`, where the model is large; else report it.
    """

    code = "HN203"


class TortureError(HarnessError):
    """Brute force that could not be run: a command fails unhurt, or the process that forks it ends.

    To mend it: run the command that the message names by itself; it has to succeed first.
    """

    code = "HN206"
    exit_code = 3


class GoldenRecordError(HarnessError):
    """Goldens that are not recorded so: in CI, without a reason, or from a model that fails.

    To mend it: `golden record --reason "..."` by hand, after the change that means it.
    """

    code = "HN301"


class GoldenFormatError(HarnessError):
    """A golden that cannot be relied on: of another format, or edited since it was recorded.

    To mend it: take the file from version control, or record it anew and say why.
    """

    code = "HN302"


def _rebuild(
    kind: type[WorkerFailedError], message: str, fields: dict[str, object]
) -> WorkerFailedError:
    return kind(message, **fields)  # type: ignore[arg-type]  # the fields are those of __reduce__
