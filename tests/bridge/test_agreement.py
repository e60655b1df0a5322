"""A configuration and the args of a checkpoint: one model, or every difference by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from bridge.agreement import check_agreement, spec_differences
from bridge.convert import read_spec
from bridge.errors import InconsistentConfigError
from bridge.megatron_args import checkpoint_args
from bridge.pipeline import plan_layout
from bridge.spec import NoOp
from bridge.storage.megatron import MegatronSource

VARIANTS = Path(__file__).parents[2] / "suites" / "variants"
SPEC = read_spec(VARIANTS / "Llama-3_3-Nemotron-Super-49B-v1.json")


class Source:
    """As much of a checkpoint as the comparison looks at."""

    def __init__(self, **changed: object) -> None:
        found = checkpoint_args(SPEC, plan_layout(SPEC)) | changed
        self.args = {name: value for name, value in found.items() if value is not ...}
        self.args_where = "common.pt: args"


def check(**changed: object) -> None:
    """Compare the configuration with its own args, some of them changed or (`...`) removed."""
    check_agreement(cast(MegatronSource, Source(**changed)), SPEC, where="config.json")


def test_a_checkpoint_of_the_configuration_agrees() -> None:
    """Also where the args lack what most training runs do not record."""
    check()
    check(use_rope_scaling=..., vocab_size=...)


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        ({"norm_epsilon": 1e-6}, "layernorm_epsilon"),
        ({"rotary_base": 10000}, "rope"),
        ({"rotary_base": 10000, "use_rope_scaling": ...}, "rope"),
        ({"rope_scaling_factor": 16.0}, "rope"),
        ({"kv_channels": 64}, "kv_channels"),
        ({"untie_embeddings_and_output_weights": False}, "share_embeddings_and_output_weights"),
    ],
    ids=str,
)
def test_every_contradiction_is_named(changed: dict[str, object], place: str) -> None:
    """A base that the args state is theirs, even where they do not say whether it is scaled."""
    with pytest.raises(InconsistentConfigError) as caught:
        check(**changed)
    assert any(entry.startswith(f"{place}: ") for entry in caught.value.where)


def test_a_differing_block_is_one_line_in_words() -> None:
    """Not the repr of eighty blocks."""
    blocks = (replace(SPEC.blocks[0], ffn=NoOp()), *SPEC.blocks[1:-1])
    first, last = spec_differences(SPEC, replace(SPEC, blocks=blocks), names=("here", "there"))
    assert first == (
        "block 0: attention GQA, 8 groups and FFN SwiGLU 14336 in here, "
        "attention GQA, 8 groups and FFN nothing in there"
    )
    assert last.startswith("block 79: ")
    assert last.endswith("none in there")
