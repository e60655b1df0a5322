"""Layout names mean one layout each, and unknown ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.errors import TensorParallelError
from bridge.hf_config import spec_from_hf_config
from bridge.spec import ModelSpec
from harness.errors import SuiteError
from harness.layouts import check_layout_name, read_layouts, resolve_layout
from harness.toys import toy_named


@pytest.fixture
def spec() -> ModelSpec:
    """A homogeneous model of six layers."""
    return spec_from_hf_config(toy_named("nano-4b").config)


def test_a_spelled_out_name_is_split_by_the_planner(spec: ModelSpec) -> None:
    """Six equal layers over two stages are three each."""
    layout = resolve_layout("tp2-pp2", spec)
    assert (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size) == (2, 2)
    assert layout.num_layers_per_stage == (3, 3)


def test_the_uneven_layout_is_uneven(spec: ModelSpec) -> None:
    """Two layers on the first stage, the rest on the second."""
    assert resolve_layout("tp1-pp2-uneven", spec).num_layers_per_stage == (2, 4)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    """Before any model is at hand."""
    with pytest.raises(SuiteError, match="no layout is called 'sideways'") as caught:
        check_layout_name("sideways")
    assert "tp1-pp2-uneven" in str(caught.value.hint)


def test_a_layout_that_does_not_fit_the_model_is_the_models_error(spec: ModelSpec) -> None:
    """Eight heads over three ranks."""
    with pytest.raises(TensorParallelError):
        resolve_layout("tp3-pp1", spec)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[tp2-pp1]\nsequence_parallel = true", "already means what it spells"),
        ("[a]\ntensor_parallel = 2", "unknown field tensor_parallel"),
        ("[a]\ntensor_model_parallel_size = '2'", "is no count"),
        ("[a]\nsequence_parallel = 1", "is no flag"),
        ("[a]\nnum_layers_in_first_pipeline_stage = 1", "pipeline_model_parallel_size = 2"),
        ("a = 1", "a is not a table"),
    ],
)
def test_a_definition_that_makes_no_sense_is_refused(
    tmp_path: Path, text: str, problem: str
) -> None:
    """A typo must not become a plain tp1-pp1."""
    path = tmp_path / "layouts.toml"
    path.write_text(f"schema_version = 1\n{text}\n", "utf-8")
    with pytest.raises(SuiteError) as caught:
        read_layouts(path)
    assert problem in str(caught.value)


def test_a_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    """Nothing is guessed."""
    path = tmp_path / "layouts.toml"
    path.write_text("schema_version = 2\n", "utf-8")
    with pytest.raises(SuiteError, match="schema_version"):
        read_layouts(path)
