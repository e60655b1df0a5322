"""The golden models have the traits that they are made from."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.errors import ConfigError, TargetExistsError
from harness.compare import read_safetensors
from harness.features import features_of_spec
from harness.golden.cases import GoldenModel, golden_model, golden_models, write_checkpoint
from harness.oracle import Absent, Attention, Mlp, Replaced, read_config
from harness.toys.model import hf_tensors

MODELS = golden_models()
EVERY = pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))


@EVERY
def test_a_model_has_its_traits(model: GoldenModel) -> None:
    """As the oracle, which shares no code with the bridge, reads its configuration."""
    row, read = model.factors, read_config(model.config)
    attentions = {type(attention) for attention, _ in read.blocks[1:]}
    ffns = {type(ffn) for _, ffn in read.blocks[1:]}
    if len(read.blocks) > 1:
        whole: dict[str, set[type]] = {
            "plain": set(), "with linear": {Replaced}, "with no-op": {Absent},
            "all kinds": {Replaced, Absent},
        }  # fmt: skip
        assert attentions == whole[row["attention"]] | {Attention}
        assert ffns == whole[row["ffn"]] | {Mlp}
    first = {
        "full": (Attention, Mlp), "no-op": (Absent, Absent), "linear": (Replaced, Replaced),
        "no-op attention": (Absent, Mlp), "no-op ffn": (Attention, Absent),
    }[row["block 0"]]  # fmt: skip
    assert tuple(map(type, read.blocks[0])) == first
    assert len(read.blocks) == int(row["layers"])
    assert read.layernorm_epsilon == float(row["epsilon"])
    assert read.tied == (row["embeddings"] == "tied")
    size = read.num_attention_heads * read.kv_channels - read.hidden_size
    assert {"wider": size > 0, "narrower": size < 0}.get(row["head_dim"], size == 0)
    assert ("head_dim" in model.config) == (row["head_dim"] != "absent")
    scaling = {"plain": None, "llama3 x8": 8, "llama3 x16": 16, "other": 2.5}[row["rope"]]
    assert (read.rope.llama3 and read.rope.llama3[0]) == scaling


def test_the_set_reaches_what_models_of_the_family_can_have() -> None:
    """The features that property tests hunt for, in a set that is the same every time."""
    met = set().union(*(features_of_spec(model.spec) for model in MODELS.values()))
    assert met >= {
        "no-op block 0", "all no-op", "one query group", "one query head per group",
        "unequal query groups", "unequal widths", "odd width", "odd vocab", "tied", "untied",
        "heads x kv_channels != hidden", "homogeneous", "heterogeneous", "one layer",
        "linear+linear", "no-op+swiglu", "grouped+no-op", "other llama3 values",
    }  # fmt: skip


def test_a_checkpoint_holds_the_tensors_of_its_configuration(tmp_path: Path) -> None:
    """As the toys' own list has them, read by safetensors' own reader, in several shards."""
    model = golden_model("puzzletron-11")
    write_checkpoint(model, tmp_path / "hf")
    stored = read_safetensors(tmp_path / "hf")
    expected = hf_tensors(read_config(model.config))
    assert {name: tuple(stored[name].shape) for name in stored} == expected
    assert {str(stored[name].dtype) for name in stored} == {f"torch.{model.dtype}"}
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    with pytest.raises(TargetExistsError):
        write_checkpoint(model, tmp_path / "hf")


def test_an_unknown_name_is_refused() -> None:
    """One error, which shows the names there are."""
    with pytest.raises(ConfigError, match="no golden model is called 'nope'") as caught:
        golden_model("golden-nope")
    assert "all-no-op" in str(caught.value)
