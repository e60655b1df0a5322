"""Every deliberate error, each with a stable code.

An error says what is wrong, where, and how to mend it; it prints as

    BR201 num_query_groups=8 is neither a multiple nor a divisor of tensor_model_parallel_size=3
      --> config.json: block_configs[17].attention
    help: choose tensor_model_parallel_size from {1, 2, 4, 8, 16}

Anything else that escapes is our own bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

_MAX_SHOWN: Final = 50


class BridgeError(Exception):
    """A problem the user can act on.

    Args:
        message: What is wrong, one sentence.
        where: The file, field, tensor or command it was found in. Several places when several
            offenders are reported at once; each is printed on its own line.
        hint: What to do about it, printed after `help:`.
    """

    code: ClassVar[str] = "BR000"
    exit_code: ClassVar[int] = 2

    def __init__(
        self, message: str, *, where: str | Sequence[str] = (), hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        places = (where,) if isinstance(where, str) else where
        self.where = tuple(place for place in places if place)
        self.hint = hint

    def __str__(self) -> str:
        """Render the diagnostic: code and message, places, help.

        All places are in `where`; a screenful of them is printed.
        """
        shown = self.where[:_MAX_SHOWN]
        lines = [f"{self.code} {self.message}", *(f"  --> {place}" for place in shown)]
        if len(self.where) > len(shown):
            lines.append(f"  ... and {len(self.where) - len(shown)} more")
        if self.hint:
            lines.append(f"help: {self.hint}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        """Survive the trip between rank processes, keyword arguments included."""
        return _rebuild, (type(self), self.message, self.where, self.hint)


def _rebuild(
    kind: type[BridgeError], message: str, where: tuple[str, ...], hint: str | None
) -> BridgeError:
    return kind(message, where=where, hint=hint)


class UsageError(BridgeError):
    """A request that makes no sense, or that would cost the user data."""

    code = "BR001"


class ConfigError(BridgeError):
    """A configuration that cannot be read, or cannot be honoured."""

    code = "BR100"


class UnsupportedArchitectureError(ConfigError):
    """`architectures` / `model_type` name a model outside the family."""

    code = "BR101"


class UnmappedFieldError(ConfigError):
    """A configuration field whose meaning the bridge does not know."""

    code = "BR102"


class UnsupportedFieldError(ConfigError):
    """A field whose meaning is known and which Megatron-Core cannot express."""

    code = "BR103"


class InconsistentConfigError(ConfigError):
    """Fields that contradict one another, or values outside their range."""

    code = "BR104"


class RemoteCodeError(ConfigError):
    """A checkpoint's own Python code is needed and is not allowed, or does not import."""

    code = "BR105"


class LayoutError(BridgeError):
    """A parallel layout this model cannot be cut into."""

    code = "BR200"


class TensorParallelError(LayoutError):
    """A width, head count or group count that tensor parallelism does not divide."""

    code = "BR201"


class PipelineParallelError(LayoutError):
    """Layers that cannot be dealt out over the pipeline stages asked for."""

    code = "BR202"


class NoLayoutFitsError(LayoutError):
    """Every way of cutting this model leaves some rank with more than its memory."""

    code = "BR203"


class CheckpointError(BridgeError):
    """A checkpoint directory that is not what it should be."""

    code = "BR300"


class AccountingError(CheckpointError):
    """Missing, unexpected and mis-shaped tensors, all in one report.

    Raised by the closed accounting before any byte moves.
    """

    code = "BR301"


class CorruptFileError(CheckpointError):
    """A file whose bytes contradict its own header, index or metadata."""

    code = "BR302"


class DtypeMismatchError(CheckpointError):
    """Tensors of unequal or unknown dtype where one dtype is needed."""

    code = "BR303"


class TargetExistsError(CheckpointError):
    """The target of a conversion is already there."""

    code = "BR304"


class VerificationError(CheckpointError):
    """What was written, read back, is not what was meant."""

    code = "BR305"
    exit_code = 1


class PlanError(BridgeError):
    """A rule table that is not total or not one-to-one: a bug of ours, reported as such."""

    code = "BR400"
    exit_code = 3


class EnvironmentMissingError(BridgeError):
    """A package or device that the command needs is not there."""

    code = "BR500"
    exit_code = 3


class WorkerLostError(BridgeError):
    """A process of a conversion that several do together has died, or does not come."""

    code = "BR501"
    exit_code = 3
