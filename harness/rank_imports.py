"""What every rank process needs, imported once in the fork server; ranks then fork in milliseconds.

Nothing here may start a thread or touch a device: a process with either cannot be forked safely.
Importing Megatron-Core touches a GPU where it sees one [seen on an H200], so this process is shown
none: only ranks on the CPU are forked from it.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import warnings
from types import FrameType
from typing import Final

from bridge.crew.interrupts import signal_at_parents_death

os.environ["CUDA_VISIBLE_DEVICES"] = ""
_PARENT: Final = os.getppid()


def _end_with_parent(number: int, frame: FrameType | None) -> None:
    """Leave when the user's process is gone; the kernel also says so of one of its threads."""
    del number, frame
    if os.getppid() != _PARENT:
        os._exit(1)


# A fork server lives as long as any of its ranks, and a rank that somebody has stopped cannot see
# that nobody is there: with the server gone the kernel wakes it up (`harness.ranks`).
if any("multiprocessing.forkserver" in word for word in sys.orig_argv):
    signal.signal(signal.SIGUSR2, _end_with_parent)
    signal_at_parents_death(signal.SIGUSR2)

# Megatron-Core and its optional packages announce on import what they do not find; the server's
# streams are the user's terminal.
with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
    warnings.simplefilter("ignore")
    # Imported for the processes forked from this one.
    import megatron.core.dist_checkpointing
    import megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs
    import torch.distributed.checkpoint

    import bridge.live_parameters
    import bridge.model
    import bridge.platform
    import bridge.storage.megatron
    import harness.ranks

__all__ = ["bridge", "harness", "megatron", "torch"]
