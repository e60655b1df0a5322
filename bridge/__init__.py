"""Move Llama-Nemotron models between Hugging Face and Megatron-Core, bit for bit.

The names below are the package's front door. They are imported when they are first used, so
`import bridge` costs nothing and loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge.auto.bridge import AutoBridge
    from bridge.conversion import ConversionOptions, ConversionReport
    from bridge.convert import export_checkpoint, import_checkpoint, read_spec
    from bridge.errors import BridgeError
    from bridge.generation.decoding import Continuation, generate
    from bridge.generation.sampling import Sampling
    from bridge.live_parameters import load_hf, load_megatron
    from bridge.model import build_model
    from bridge.pipeline import parse_layout, plan_layout
    from bridge.plan import Plan
    from bridge.spec import ModelSpec, ParallelLayout
    from bridge.storage.remote import parse_location
    from bridge.transfer import TransferLimits

__version__ = "0.1.0"

_HOME = {
    "AutoBridge": "bridge.auto.bridge",
    "BridgeError": "bridge.errors",
    "Continuation": "bridge.generation.decoding",
    "ConversionOptions": "bridge.conversion",
    "ConversionReport": "bridge.conversion",
    "ModelSpec": "bridge.spec",
    "ParallelLayout": "bridge.spec",
    "Plan": "bridge.plan",
    "Sampling": "bridge.generation.sampling",
    "TransferLimits": "bridge.transfer",
    "build_model": "bridge.model",
    "export_checkpoint": "bridge.convert",
    "generate": "bridge.generation.decoding",
    "import_checkpoint": "bridge.convert",
    "load_hf": "bridge.live_parameters",
    "load_megatron": "bridge.live_parameters",
    "parse_layout": "bridge.pipeline",
    "parse_location": "bridge.storage.remote",
    "plan_layout": "bridge.pipeline",
    "read_spec": "bridge.convert",
}

__all__ = [
    "AutoBridge",
    "BridgeError",
    "Continuation",
    "ConversionOptions",
    "ConversionReport",
    "ModelSpec",
    "ParallelLayout",
    "Plan",
    "Sampling",
    "TransferLimits",
    "build_model",
    "export_checkpoint",
    "generate",
    "import_checkpoint",
    "load_hf",
    "load_megatron",
    "parse_layout",
    "parse_location",
    "plan_layout",
    "read_spec",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    """Import a public name on first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
