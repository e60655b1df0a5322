"""Convert with an installed Megatron-Bridge. Run by its path, in the interpreter that has it.

python trial_peer.py import HF MEGATRON | export HF MEGATRON TARGET
"""

from __future__ import annotations

import importlib
import sys


def main(direction: str, hf: str, megatron: str, target: str = "") -> None:
    """Do what its own documentation shows."""
    bridge = importlib.import_module("megatron.bridge").AutoBridge
    if direction == "import":
        bridge.import_ckpt(hf, megatron)
    else:
        bridge.from_hf_pretrained(hf).export_ckpt(megatron, target, show_progress=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
