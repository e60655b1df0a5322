"""The published checkpoints of the family, and what is known of each.

Sources: the model cards on the Hub and the configurations under `suites/variants/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One checkpoint on the Hub."""

    hub_id: str
    architecture: str
    num_layers: int
    num_parameters: int | None
    """Exact; None where the block list is not at hand."""
    traits: str


FAMILY: Final = (
    Published(
        hub_id="nvidia/Llama-3.1-Nemotron-Nano-4B-v1.1",
        architecture="LlamaForCausalLM",
        num_layers=32,
        num_parameters=4_512_746_496,
        traits="head_dim 128 with hidden_size 3072: heads x head_dim is not hidden_size",
    ),
    Published(
        hub_id="nvidia/Llama-3.1-Nemotron-Nano-8B-v1",
        architecture="LlamaForCausalLM",
        num_layers=32,
        num_parameters=8_030_261_248,
        traits="homogeneous",
    ),
    Published(
        hub_id="nvidia/Llama-3.1-Nemotron-70B-Instruct-HF",
        architecture="LlamaForCausalLM",
        num_layers=80,
        num_parameters=70_553_706_496,
        traits="homogeneous, 8 query heads per group",
    ),
    Published(
        hub_id="nvidia/Llama-3_1-Nemotron-51B-Instruct",
        architecture="DeciLMForCausalLM",
        num_layers=80,
        num_parameters=None,
        traits="linear replacements, several group counts and widths",
    ),
    Published(
        hub_id="nvidia/Llama-3_3-Nemotron-Super-49B-v1",
        architecture="DeciLMForCausalLM",
        num_layers=80,
        num_parameters=49_867_145_216,
        traits="31 blocks without attention, 6 FFN widths, RoPE factor 8",
    ),
    Published(
        hub_id="nvidia/Llama-3_3-Nemotron-Super-49B-v1_5",
        architecture="DeciLMForCausalLM",
        num_layers=80,
        num_parameters=49_867_145_216,
        traits="as Super-49B-v1, RoPE factor 16",
    ),
    Published(
        hub_id="nvidia/Llama-3_1-Nemotron-Ultra-253B-v1",
        architecture="DeciLMForCausalLM",
        num_layers=162,
        num_parameters=253_401_268_224,
        traits="98 blocks without attention, 81 of them empty, FFNs up to 425984 wide",
    ),
)
