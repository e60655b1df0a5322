"""Every deliberate error, each with a stable code.

An error says what is wrong, where, and how to mend it; it prints as

    BR201 num_query_groups=8 is neither a multiple nor a divisor of tensor_model_parallel_size=3
      --> config.json: block_configs[17].attention
    help: choose tensor_model_parallel_size from {1, 2, 4, 8, 16}

Anything else that escapes is our own bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Final

from bridge.visible import visible_line

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
    is_said = False
    """Whether it is on stderr already, for a process that may be ended before it gets there."""

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

        All places are in `where`; a screenful of them is printed. Each is one line whatever names
        are in it, and no terminal does what they say.
        """
        shown = self.where[:_MAX_SHOWN]
        lines = [f"{self.code} {self.message}", *(f"  --> {place}" for place in shown)]
        if len(self.where) > len(shown):
            lines.append(f"  ... and {len(self.where) - len(shown)} more")
        if self.hint:
            lines.append(f"help: {self.hint}")
        return "\n".join(map(visible_line, lines))

    def __reduce__(self) -> tuple[object, ...]:
        """Survive the trip between rank processes, keyword arguments included."""
        return _rebuild, (type(self), self.message, self.where, self.hint)


def _rebuild(
    kind: type[BridgeError], message: str, where: tuple[str, ...], hint: str | None
) -> BridgeError:
    return kind(message, where=where, hint=hint)


class UsageError(BridgeError):
    """A request that makes no sense, or that would cost the user data.

    Flags that exclude one another, a size that is no size, a target inside its source.

    To mend it: the message names the flag; `nemotron-bridge COMMAND --help` says what it takes.
    """

    code = "BR001"


class ConfigError(BridgeError):
    """A configuration that cannot be read, or cannot be honoured.

    The file is missing, is no JSON, or is no object.

    To mend it: give a checkpoint directory, a `config.json` or a Hub id.
    """

    code = "BR100"


class UnsupportedArchitectureError(ConfigError):
    """`architectures` / `model_type` name a model outside the family.

    The bridge takes `LlamaForCausalLM` and `DeciLMForCausalLM`, and proves what it takes.

    To mend it: `nemotron-bridge list` shows the family. A relative that is made of the same parts
    needs a reader of its configuration first.
    """

    code = "BR101"


class UnmappedFieldError(ConfigError):
    """A configuration field whose meaning the bridge does not know.

    It may be harmless, or may change what the model computes; a guess would be no proof.

    To mend it: look it up in the model's own code. If it changes no number, name it with
    `--carry-field`: it is written back as it was on export.
    """

    code = "BR102"


class UnsupportedFieldError(ConfigError):
    """A field whose meaning is known and which Megatron-Core cannot express.

    Sliding windows, attention sinks, biases, other activations, MoE, Mamba and the like.

    To mend it: there is no flag for it. A model that is converted nevertheless would be another
    model.
    """

    code = "BR103"


class InconsistentConfigError(ConfigError):
    """Fields that contradict one another, or values outside their range.

    Often a file edited by hand: head counts that do not divide, a block list of another length.

    To mend it: compare with the published file; every offender is listed at once.
    """

    code = "BR104"


class RemoteCodeError(ConfigError):
    """A checkpoint's own Python code is needed and is not allowed, or does not import.

    DeciLM needs no remote code here. It runs only as a second reference, on request, and needs the
    transformers it was written for (4.48 to 4.53).

    To mend it: leave `--trust-remote-code` away, or take the logits where that version is
    installed (`nemotron-bridge logits`) and give the file to `verify --reference-logits`.
    """

    code = "BR105"


class LayoutError(BridgeError):
    """A parallel layout this model cannot be cut into.

    To mend it: `nemotron-bridge inspect M --tp T --pp P` tries a layout without any weights.
    """

    code = "BR200"


class TensorParallelError(LayoutError):
    """A width, head count or group count that tensor parallelism does not divide.

    Attention is cut by heads and query groups, an FFN by its width, a linear replacement by its
    rows; each block has its own.

    To mend it: take a `--tp` from the help line.
    """

    code = "BR201"


class PipelineParallelError(LayoutError):
    """Layers that cannot be dealt out over the pipeline stages asked for.

    More stages than layers, or model parts that do not come out even over the ranks.

    To mend it: a smaller `--pp` or `--vp`; stages need not be equal, they are balanced by
    parameters.
    """

    code = "BR202"


class NoLayoutFitsError(LayoutError):
    """Every way of cutting this model leaves some rank with more than its memory.

    All TP sizes that divide the model and a node were tried, with all PP sizes that are left.

    To mend it: the message names the smallest memory, and the smallest number of GPUs, that would
    do. In training a shorter `--sequence-length` and `--recompute-granularity full` need less.
    """

    code = "BR203"


class CheckpointError(BridgeError):
    """A checkpoint directory that is not what it should be.

    To mend it: the message says what was looked for and what was found. A Hugging Face checkpoint
    has `config.json` and `.safetensors`; Megatron's has an iteration directory with `.metadata`.
    """

    code = "BR300"


class AccountingError(CheckpointError):
    """Missing, unexpected and mis-shaped tensors, all in one report.

    Raised by the closed accounting before any byte moves: the weights are of another model than the
    configuration, or a file of a set is missing.

    To mend it: compare the two; `nemotron-bridge plan M` lists what the configuration asks for.
    """

    code = "BR301"


class CorruptFileError(CheckpointError):
    """A file whose bytes contradict its own header, index or metadata.

    A download or a copy that was cut short, or storage that went bad.

    To mend it: fetch the file that the message names anew.
    """

    code = "BR302"


class DtypeMismatchError(CheckpointError):
    """Tensors of unequal or unknown dtype where one dtype is needed.

    Quantised weights, or a mixture.

    To mend it: take the checkpoint in its published precision.
    """

    code = "BR303"


class UnsafeFileError(CheckpointError):
    """A file that leads out of its checkpoint, or that is no file.

    A link to somewhere else, which could be a private key that an export would carry along; a FIFO,
    which nobody ever writes to; a device. Links inside the Hub's cache are followed.

    To mend it: put the file itself there. Where the links are your own, such as weights on another
    disk, `--follow-links` allows them.
    """

    code = "BR307"


class TargetExistsError(CheckpointError):
    """The target of a conversion is already there.

    Nothing is overwritten unasked.

    To mend it: another path, or `--overwrite`, which replaces the old target once the new one is
    complete and verified.
    """

    code = "BR304"


class VerificationError(CheckpointError):
    """What was written, read back, is not what was meant.

    The target did not appear; the source is untouched.

    To mend it: try again; twice in a row, suspect memory or disk, and report it.
    """

    code = "BR305"
    exit_code = 1


class ResumeError(CheckpointError):
    """What an earlier attempt has left cannot be gone on with.

    The source has changed since, or what was begun there is another conversion. Going on would mix
    two models.

    To mend it: give the same command as before, or leave `--resume` away to start over.
    """

    code = "BR306"


@contextmanager
def named_refusals() -> Iterator[None]:
    """Around work with files: what the system refuses is the user's to mend, and no crash.

    Raises:
        CheckpointError: BR300, for every OSError that nobody has named better.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"the system refuses: {error.strerror or error}",
            where=str(error.filename or ""),
            hint="see that the path is there and may be read and written, and run it again",
        ) from error


class PlanError(BridgeError):
    """A rule table that is not total or not one-to-one: a bug of ours, reported as such.

    To mend it: please report it, with the configuration.
    """

    code = "BR400"
    exit_code = 3


class EnvironmentMissingError(BridgeError):
    """A package or device that the command needs is not there.

    To mend it: the help line names the package or the extra, such as `nemotron-bridge[te]`.
    """

    code = "BR500"
    exit_code = 3


class WorkerLostError(BridgeError):
    """A process of work that several do together has died, hangs, or does not come.

    Killed for memory, stopped, stuck at a disk, or a machine that went away; the message names it,
    and where it hangs. The others have ended, and the target did not appear.

    To mend it: run the command again. Where a process is only slow, give a longer `--timeout`.
    """

    code = "BR501"
    exit_code = 3


class DisagreementError(BridgeError):
    """The processes of one conversion are not about to do the same thing.

    They were given different options, see another source under the same path, or run other versions
    of the bridge. Nothing has been written.

    To mend it: the message says which rank has what. Start all of them with the same command and
    the same software, on a file system that all of them see.
    """

    code = "BR502"
