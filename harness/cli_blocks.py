"""What `--verify auto` adds to `import` and `export`: see `harness.block_parity`.

Importing this module imports no torch: it waits for the conversion to have ended.
"""

from __future__ import annotations

import traceback
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bridge.storage.remote import Location
    from harness.block_parity import BlockParity


def verify_blocks(
    hf: Location, megatron: Location, *, carry: Collection[str], num_rounded: int = 0
) -> BlockParity:
    """Prove the pair within the budget; where that cannot be done, say why: its bits are proved.

    A crash is our own bug: its traceback goes to stderr, and the command exits with 3.
    """
    from bridge.crew.launch import under_torchrun
    from bridge.errors import BridgeError
    from harness.block_parity import BlockParity, prove_blocks

    if not isinstance(hf, Path) or not isinstance(megatron, Path):
        return BlockParity(
            status="not run",
            summary="it reads files of this machine; `--verify full` downloads them",
        )
    if num_rounded:
        return BlockParity(
            status="not run",
            summary=f"rounding gave {num_rounded:,} elements another value, and each was checked; "
            "export in the same dtype, and `verify` that pair",
        )
    if under_torchrun():
        return BlockParity(
            status="not run",
            summary="not in the processes of torchrun; run `nemotron-bridge verify --stream` alone",
        )
    try:
        return prove_blocks(hf, megatron, carry=carry)
    except (BridgeError, ImportError) as error:
        return BlockParity(status="not run", summary=str(error).splitlines()[0])
    except Exception as error:  # noqa: BLE001 - the conversion is done, and its bits are proved
        traceback.print_exc()
        reason = traceback.format_exception_only(error)[-1].strip()
        return BlockParity(status="error", summary=reason)
