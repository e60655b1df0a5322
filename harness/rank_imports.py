"""What every rank process needs, imported once in the fork server; ranks then fork in milliseconds.

Nothing here may start a thread or touch a device: a process with either cannot be forked safely.
Importing Megatron-Core touches a GPU where it sees one [seen on an H200], so this process is shown
none: only ranks on the CPU are forked from it.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import signal
import socket
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Final

from bridge.crew.interrupts import signal_at_parents_death

os.environ["CUDA_VISIBLE_DEVICES"] = ""
_PARENT: Final = os.getppid()
_SERVER: Final = os.getpid()


def _end_with_parent(number: int, frame: FrameType | None) -> None:
    """Leave when the user's process is gone; the kernel also says so of one of its threads."""
    del number, frame
    if os.getpid() == _SERVER and os.getppid() != _PARENT:
        _remove_socket()
        os._exit(1)


def _address() -> str:
    """Where this process listens: its command line begins with the descriptor."""
    listener = int(sys.orig_argv[-1].partition("main(")[2].partition(",")[0])
    with socket.socket(fileno=os.dup(listener)) as here:
        return os.fsdecode(here.getsockname())


def _remove_socket() -> None:
    """Do what the user's process does at its end, unless it is killed: `pymp-...` is gone then."""
    with contextlib.suppress(OSError, ValueError):  # it has done it; Python 3.11.0 makes no file
        Path(_socket).unlink()
        Path(_socket).parent.rmdir()


# A fork server lives as long as any of its ranks, and a rank that somebody has stopped cannot see
# that nobody is there: with the server gone the kernel wakes it up (`harness.ranks`). The server
# may be stopped, too, and SIGCONT is the one signal that wakes it.
if any("multiprocessing.forkserver" in word for word in sys.orig_argv):
    _socket = _address()
    signal.signal(signal.SIGCONT, _end_with_parent)
    signal_at_parents_death(signal.SIGCONT)
    atexit.register(_remove_socket)

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
