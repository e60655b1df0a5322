"""The strategies keep to what they are asked for; `tests/property` asserts what they reach."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.hf_blocks import width_to_ffn_mult
from bridge.spec import ModelSpec, ParallelLayout, SwiGLU, tensor_parallel_problems
from harness.strategies import (
    model_specs,
    models_with_layouts,
    parallel_layouts,
    tensor_parallel_sizes_of,
)


@given(model_specs(tensor_parallel_sizes=(8,), max_layers=3))
def test_a_model_can_be_cut_by_the_size_asked_for(spec: ModelSpec) -> None:
    """Divisibility is built in: no draw has to be thrown away for it."""
    assert tensor_parallel_problems(spec, 8) == []
    assert tensor_parallel_sizes_of(spec) == (1, 2, 4, 8)


@given(model_specs(heterogeneous=True, expressible_by_ffn_mult=True, max_layers=2))
def test_a_model_is_of_the_kind_asked_for(spec: ModelSpec) -> None:
    """DeciLM only, within the depth, in sizes the released block schema can state."""
    assert spec.heterogeneous_block_specs
    assert spec.num_layers <= 2
    assert spec.hidden_size == spec.num_attention_heads * spec.kv_channels
    assert all(
        width_to_ffn_mult(block.ffn.ffn_hidden_size, spec.hidden_size)
        for block in spec.blocks
        if isinstance(block.ffn, SwiGLU)
    )


@given(model_specs(heterogeneous=False))
def test_a_llama_has_equal_blocks(spec: ModelSpec) -> None:
    """Asked for homogeneous models, the strategy draws no DeciLM."""
    assert not spec.heterogeneous_block_specs
    assert len(set(spec.blocks)) == 1


@given(models_with_layouts())
def test_every_layout_fits_its_model(drawn: tuple[ModelSpec, ParallelLayout]) -> None:
    """A drawn pair is accepted as it is."""
    spec, layout = drawn
    layout.validate_for(spec)


@pytest.mark.parametrize(
    "sizes", [{"max_layers": 0}, {"tensor_parallel_sizes": ()}, {"tensor_parallel_sizes": (0, 1)}]
)
def test_impossible_models_are_refused_when_asked_for(sizes: dict[str, int]) -> None:
    """An empty strategy would make every test built on it pass unseen."""
    with pytest.raises(ValueError, match="positive"):
        model_specs(**sizes)  # type: ignore[arg-type]  # wrong on purpose


@given(st.data(), model_specs(max_layers=1))
def test_impossible_layouts_are_refused_when_asked_for(
    data: st.DataObject, spec: ModelSpec
) -> None:
    """No stage or no rank is no layout; one of each is the trivial one."""
    for sizes in ({"max_pipeline_stages": 0}, {"max_world_size": 0}):
        with pytest.raises(ValueError, match="positive"):
            parallel_layouts(spec, **sizes)  # type: ignore[arg-type]  # wrong on purpose
    trivial = parallel_layouts(spec, max_pipeline_stages=1, max_world_size=1)
    assert data.draw(trivial).name == "tp1-pp1"
