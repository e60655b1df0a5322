"""What every rank process needs, imported once in the fork server; ranks then fork in milliseconds.

Nothing here may start a thread or touch a device: a process with either cannot be forked safely.
Importing Megatron-Core touches a GPU where it sees one [seen on an H200], so this process is shown
none: only ranks on the CPU are forked from it.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings

os.environ["CUDA_VISIBLE_DEVICES"] = ""

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
