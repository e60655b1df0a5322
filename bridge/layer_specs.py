"""Which layers a live model is made of: Megatron-Core's own, or Transformer Engine's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch

from bridge.errors import UsageError
from bridge.megatron_config import AttentionBackend, Layers
from bridge.spec import ModelSpec, Stage

# What Megatron-Core writes into the environment for each backend (megatron-core 0.16.1
# `LanguageModule._set_attention_backend`), and Transformer Engine reads at every forward pass.
_NAMES: Final = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
_VALUES: Final[Mapping[AttentionBackend, str]] = {
    "auto": "111",
    "flash": "100",
    "fused": "010",
    "unfused": "001",
}


class TokenwiseRMSNorm(torch.nn.RMSNorm):
    """RMSNorm for local layers under sequence parallelism.

    Megatron's own local norm refuses sequence parallelism, though a norm over the hidden size does
    not care which tokens a rank holds. Its weight's gradient does: each rank sees only its tokens,
    and the mark makes Megatron add the shares up, as it does for Transformer Engine's norm.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:  # noqa: ANN401, ARG002 - Megatron's call
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = True  # type: ignore[attr-defined]  # Megatron's mark


@contextlib.contextmanager
def attention_environment(layers: Layers, backend: AttentionBackend) -> Iterator[None]:
    """Build models in here: Megatron-Core pins the process's attention backend as it does so.

    Local layers read none of it and leave the environment as it was. Of Transformer Engine's
    layers a process has one backend, for an earlier model would silently change its kernels with
    a later one.

    Raises:
        UsageError: BR001, the environment has another backend already.
    """
    before = {name: os.environ.get(name) for name in _NAMES}
    if layers == "te":
        wanted = dict(zip(_NAMES, _VALUES[backend], strict=True))
        odd = [
            f"{name}={value}"
            for name, value in before.items()
            if value is not None and value != wanted[name]
        ]
        if odd:
            raise UsageError(
                f"this process computes attention with another backend than {backend!r}",
                where=odd,
                hint="a process has one attention backend: use another process, or unset these "
                "variables if they were set outside",
            )
        yield
        return
    for name in before:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def block_submodules(
    spec: ModelSpec,
    config: Any,  # noqa: ANN401 - TransformerConfig, which ships no types
    stage: Stage,
    vp_stage: int | None,
    layers: Layers,
) -> Any:  # noqa: ANN401 - TransformerBlockSubmodules, which ships no types
    """The specs of a stage's layers and of the final norm, as GPTModel takes them."""
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import (
        get_gpt_heterogeneous_layer_spec,
    )
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    if spec.heterogeneous_block_specs:
        submodules = get_gpt_heterogeneous_layer_spec(
            config, use_te=layers == "te", vp_stage=vp_stage, pp_rank=stage.pp_rank
        )
    elif layers == "te":
        from megatron.core.extensions.transformer_engine import TENorm

        layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec()
        submodules = TransformerBlockSubmodules([layer] * len(stage.layers), layer_norm=TENorm)
    else:
        layer = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm")
        # Named here, for Megatron would take Transformer Engine's wherever that is installed.
        submodules = TransformerBlockSubmodules(
            [layer] * len(stage.layers), layer_norm=WrappedTorchNorm
        )
    if config.sequence_parallel and layers == "local":
        submodules.layer_norm = TokenwiseRMSNorm
        for layer in submodules.layer_specs:
            for place in ("input_layernorm", "pre_mlp_layernorm"):
                if getattr(layer.submodules, place) is WrappedTorchNorm:
                    setattr(layer.submodules, place, TokenwiseRMSNorm)
    return submodules
