"""DeciLM for transformers, without remote code: configuration, model, and the Auto classes.

Importing this package imports torch and transformers and registers model type `nemotron-nas`, so
that `AutoModelForCausalLM.from_pretrained(directory)` loads Super-49B, Ultra-253B or the 51B with
the code that is here, whatever their `auto_map` says.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from bridge.decilm.configuration import DeciLMConfig
from bridge.decilm.modeling import DeciLMForCausalLM, DeciLMModel
from bridge.decilm.remote import RemoteCodeWarning, explain_remote_code_failure, load_reference

__all__ = [
    "DeciLMConfig",
    "DeciLMForCausalLM",
    "DeciLMModel",
    "RemoteCodeWarning",
    "explain_remote_code_failure",
    "load_reference",
    "register",
]


def register() -> None:
    """Tell the Auto classes of transformers about model type `nemotron-nas`.

    Importing this package does it. Call it again when something else took the name, as the
    checkpoint's own code does under transformers 4 with `trust_remote_code=True`. Idempotent.
    """
    AutoConfig.register(DeciLMConfig.model_type, DeciLMConfig, exist_ok=True)
    AutoModel.register(DeciLMConfig, DeciLMModel, exist_ok=True)
    AutoModelForCausalLM.register(DeciLMConfig, DeciLMForCausalLM, exist_ok=True)


register()
