"""The oracle's gradients against central differences of its forward pass, and against autograd."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from harness import oracle
from harness.oracle_gradients import loss_and_gradients
from harness.probes import short_probe
from harness.toys import TOYS, hf_tensors

if TYPE_CHECKING:
    from tests.harness.test_oracle_parity import TorchModel
else:  # a module beside this file: tests are not a package
    sys.path.append(str(Path(__file__).parent))
    from test_oracle_parity import TorchModel

Array = np.ndarray[Any, np.dtype[np.float64]]
Ids = np.ndarray[Any, np.dtype[np.int64]]

LINEAR, NOTHING = {"replace_with_linear": True}, {"no_op": True}
BLOCKS: dict[str, list[dict[str, Any]]] = {
    "grouped": [{"attention": {"num_key_value_heads": 2}, "ffn": {"intermediate_size": 5}}],
    "one group, no-op": [{"attention": {"num_key_value_heads": 1}, "ffn": NOTHING}],
    "no-op, mlp": [{"attention": NOTHING, "ffn": {"intermediate_size": 3}}],
    "linears": [{"attention": LINEAR, "ffn": LINEAR}],
    "linear, mlp": [{"attention": LINEAR, "ffn": {"intermediate_size": 1}}],
    "attention, linear": [{"attention": {"num_key_value_heads": 4}, "ffn": LINEAR}],
    "nothing": [{"attention": NOTHING, "ffn": NOTHING}] * 2,
}


def _config(blocks: list[dict[str, Any]], *, tied: bool, hidden: int = 6) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "num_attention_heads": 4, "head_dim": 2, "vocab_size": 7,
        "num_hidden_layers": len(blocks), "rms_norm_eps": 1e-3, "rope_theta": 50.0,
        "tie_word_embeddings": tied, "block_configs": blocks,
    }  # fmt: skip


def _weights(config: dict[str, Any]) -> dict[str, Array]:
    rng = np.random.default_rng(11)
    return {
        name: rng.normal(size=shape) * 0.8 + (len(shape) == 1)
        for name, shape in hf_tensors(oracle.read_config(config)).items()
    }


def _loss(config: dict[str, Any], weights: dict[str, Array], ids: Ids, positions: Ids) -> float:
    """The definition, with scalars: minus the mean log-probability of each next token."""
    logits = oracle.forward(config, weights.__getitem__, ids, positions)
    terms = []
    for batch, seq in np.ndindex(ids.shape[0], ids.shape[1] - 1):
        row = logits[batch, seq].tolist()
        terms.append(math.log(math.fsum(map(math.exp, row))) - row[ids[batch, seq + 1]])
    return math.fsum(terms) / len(terms)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_every_gradient_is_the_slope_of_the_loss(kind: str, *, tied: bool) -> None:
    """Central differences along a random direction in each tensor; a tied one moves both uses."""
    config = _config(BLOCKS[kind], tied=tied)
    weights = _weights(config)
    ids = np.array([[0, 3, 6, 3, 1], [5, 5, 2, 0, 6]])
    positions = np.array([0, 2, 3, 40, 41])
    found = loss_and_gradients(config, weights.__getitem__, ids, positions)
    assert found.loss == pytest.approx(_loss(config, weights, ids, positions), rel=1e-13)
    assert found.gradients.keys() == weights.keys()
    rng = np.random.default_rng(12)
    for name, values in weights.items():
        direction, step = rng.normal(size=values.shape), 1e-5
        ahead, behind = (
            _loss(config, weights | {name: values + sign * step * direction}, ids, positions)
            for sign in (1, -1)
        )
        slope = float(np.sum(found.gradients[name] * direction))
        # Truncation is of order step^2, cancellation 1e-16 / step.
        assert slope == pytest.approx((ahead - behind) / (2 * step), rel=2e-6, abs=1e-9), name


@pytest.mark.parametrize("name", ["nano-4b", "tied", "puzzle"])
def test_autograd_in_float64_gives_the_same(name: str) -> None:
    """Llama parts of transformers in float64, block by block: every element equal to rounding."""
    toy = TOYS[name]
    weights = {tensor: values.astype(np.float64) for tensor, values in toy.weights(3)}
    probe = short_probe(toy.config["vocab_size"])
    model = TorchModel(copy.deepcopy(dict(toy.config)), dtype=torch.float64)
    tied = {"lm_head.weight": weights.get("lm_head.weight", weights["model.embed_tokens.weight"])}
    model.load_state_dict({one: torch.from_numpy(v) for one, v in (weights | tied).items()})
    ids = torch.from_numpy(probe.input_ids)
    loss = torch.nn.functional.cross_entropy(
        model(probe)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    found = loss_and_gradients(toy.config, weights.__getitem__, probe.input_ids, probe.position_ids)
    assert found.loss == pytest.approx(loss.item(), rel=1e-13)
    parameters = dict(model.named_parameters())
    assert found.gradients.keys() == parameters.keys()
    for one, gradient in found.gradients.items():
        theirs = parameters[one].grad
        assert theirs is not None
        scale = float(theirs.abs().max())
        np.testing.assert_allclose(gradient, theirs.numpy(), rtol=0, atol=1e-12 * scale)


def test_a_sequence_of_one_token_has_no_loss() -> None:
    """There is nothing to predict; the mean of nothing is refused, not NaN."""
    config = _config(BLOCKS["grouped"], tied=False)
    with pytest.raises(ValueError, match="one token"):
        loss_and_gradients(
            config, _weights(config).__getitem__, np.array([[1], [2]]), np.array([0])
        )


def test_large_gates_overflow_nothing() -> None:
    """Where the sigmoid is zero to the last bit its gradient is zero, without a warning."""
    config = _config(BLOCKS["no-op, mlp"], tied=False)
    weights = _weights(config)
    weights["model.layers.0.mlp.gate_proj.weight"] *= 1e4
    found = loss_and_gradients(
        config, weights.__getitem__, np.array([[1, 2, 3]]), np.array([0, 1, 2])
    )
    assert all(np.isfinite(one).all() for one in found.gradients.values())
