"""What ranks do with a model's weights, as far as memory is concerned. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from bridge.errors import UsageError

Purpose = Literal["inference", "training"]
Recompute = Literal["none", "full"]

MAIN_GRADIENT: Final = {"bfloat16": 4, "float16": 2, "float32": 4}
"""Bytes of gradient per parameter. Megatron-LM accumulates those of bfloat16 in float32."""
OPTIMIZER: Final = {"bfloat16": 12, "float16": 16, "float32": 8}
"""Bytes of Adam's state per parameter: two float32 moments and, where weights are shorter, their
float32 copy; for float16 also a float32 copy of the gradient."""
# Both add up to the table of Megatron-Core's dist_optimizer.md: with the weights 18, 20 and 16.


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One kind of run.

    Args:
        purpose: Inference holds weights and a KV cache; training adds gradients and Adam.
        sequence_length: Tokens of a sequence; in inference prompt and answer together.
        micro_batch_size: Sequences that a rank works on at once.
        data_parallel_size: Replicas of the model.
        distributed_optimizer: Adam's state is dealt out over the replicas.
        recompute: `full` keeps each block's input alone and runs the block again on the way back.
        params_dtype: Of weights, activations and cache; torch's name.
        layers: Transformer Engine's with fused attention and Megatron-LM's fused SwiGLU, or
            Megatron-Core's local ones as `bridge.model` builds them, without any fusion.

    Raises:
        UsageError: BR001, a size below one, or a dtype that Megatron-LM does not train in.
    """

    purpose: Purpose = "inference"
    sequence_length: int = 8192
    micro_batch_size: int = 1
    data_parallel_size: int = 1
    distributed_optimizer: bool = True
    recompute: Recompute = "none"
    params_dtype: str = "bfloat16"
    layers: Literal["te", "local"] = "te"

    def __post_init__(self) -> None:
        """Check each value by itself."""
        sizes = {
            "sequence_length": self.sequence_length,
            "micro_batch_size": self.micro_batch_size,
            "data_parallel_size": self.data_parallel_size,
        }
        wrong = [f"{name}={size}" for name, size in sizes.items() if size < 1]
        if wrong:
            raise UsageError("sizes of a workload must be positive", where=wrong)
        if self.purpose == "training" and self.params_dtype not in MAIN_GRADIENT:
            raise UsageError(
                f"no memory estimate for training weights of {self.params_dtype}",
                hint=f"choose the dtype from {', '.join(MAIN_GRADIENT)}",
            )

    @property
    def tokens(self) -> int:
        """Tokens of one micro batch."""
        return self.sequence_length * self.micro_batch_size
