"""What must be so before the first case: room to work, files that all ranks see, exact products."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bridge.errors import EnvironmentMissingError, UsageError
from bridge.scratch import held_directory
from harness.torchrun.lead import torchrun_ranks

if TYPE_CHECKING:
    from harness.bench import Subject
    from harness.suite import Case

_ROUGH: Final = 100.0
"""Error of a product, in ulp of float32, that only TF32 reaches: 2,468 were measured."""


@contextmanager
def scratch(parent: Path | None) -> Iterator[Path]:
    """A directory for toys and conversions, while it is needed.

    Args:
        parent: Where, made if it is not there; None for the system's temporary directory.

    Raises:
        UsageError: BR001, nothing can be made there.
    """
    with ExitStack() as stack:
        try:
            directory = Path(stack.enter_context(_made(parent)))
        except OSError as error:
            raise UsageError(
                f"cannot work there: {error.strerror}",
                where=str(parent or tempfile.gettempdir()),
                hint="give --workdir a directory that can be written to",
            ) from None
        yield directory


def _made(parent: Path | None) -> AbstractContextManager[Path | str]:
    if parent is None:
        return held_directory()
    parent = parent.absolute()  # for ranks, wherever they are
    parent.mkdir(parents=True, exist_ok=True)
    # Machines share it, and not always their locks: nobody is to sweep there. A network's file
    # system keeps what is still mapped: no reason to lose the results.
    return tempfile.TemporaryDirectory(
        prefix="nemotron-bridge-", dir=parent, ignore_cleanup_errors=True
    )


def check_shared(directory: Path, report_dir: Path | None, subjects: Mapping[str, Subject]) -> None:
    """See that all machines of torchrun look at the same files, where there are several."""
    ranks = torchrun_ranks()
    if ranks is not None:
        models = [path for one in subjects.values() for path in (one.hf, one.megatron) if path]
        ranks.check_shared([directory, *([report_dir] if report_dir else [])], models)


def float32_products(cases: Sequence[Case]) -> dict[str, float]:
    """See that products on a GPU are float32's in this process and those it will start.

    Raises:
        EnvironmentMissingError: BR500, they are TF32's; or Transformer Engine does not load.
    """
    import torch

    from bridge.platform import float32_product_error, forbid_tf32

    used = {case.layers for case in cases if case.device == "cuda"}
    if not used:
        return {}
    forbid_tf32()
    if not torch.cuda.is_available():
        return {}
    if used != {"local"} and importlib.util.find_spec("transformer_engine") is not None:
        try:
            import transformer_engine.pytorch  # noqa: F401 - to be measured, too
        except (ImportError, OSError) as error:
            raise EnvironmentMissingError(
                "Transformer Engine is installed and does not load",
                where=str(error).partition("\n")[0],
                hint="install one that was built for this torch, or run with --layers local",
            ) from error
    found = float32_product_error()
    rough = [f"{name}: {error:.0f} ulp" for name, error in found.items() if error > _ROUGH]
    if rough:
        raise EnvironmentMissingError(
            "float32 products on this GPU are rounded to TF32",
            where=rough,
            hint="set NVIDIA_TF32_OVERRIDE=0 before anything starts CUDA",
        )
    return found
