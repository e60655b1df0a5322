"""The twin: which blocks it has, which traits it keeps, and that it can be spoilt as well."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest

from bridge.errors import InconsistentConfigError, UnsupportedFieldError
from bridge.hf_config import spec_from_hf_config
from bridge.parameters import num_parameters
from harness.faults import CATALOGUE, applicable
from harness.locations import suites_dir
from harness.oracle import Absent, Attention, Mlp, read_config
from harness.qualify import twin as twins
from harness.qualify.twin import make_twin
from harness.samples import draw_samples
from harness.toys import TOYS
from harness.toys.configs import published_config

ULTRA = "Llama-3_1-Nemotron-Ultra-253B-v1"
SUPER = "Llama-3_3-Nemotron-Super-49B-v1"


def models() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every published configuration, every toy's, and drawn ones of all kinds."""
    for path in sorted((suites_dir() / "variants").glob("*.json")):
        yield path.stem, json.loads(path.read_text("utf-8"))
    yield from ((name, toy.config) for name, toy in TOYS.items())
    for number, sample in enumerate(draw_samples(25, start=11)):
        yield f"drawn-{number}", dict(sample.config)


@pytest.mark.parametrize(("name", "config"), [pytest.param(*one, id=one[0]) for one in models()])
def test_a_twin_is_read_alike_and_can_have_every_fault_that_its_original_can(
    name: str, config: dict[str, Any]
) -> None:
    """Fields are those of the original; blocks are some of its, in order; no fault is lost."""
    original = copy.deepcopy(config)
    made = make_twin("small", config)
    assert original == config, "the original is left alone"
    real, small = spec_from_hf_config(config), spec_from_hf_config(made.toy.config)
    assert config.keys() == made.toy.config.keys()
    assert list(made.layer_idx) == sorted(set(made.layer_idx))
    assert [
        (type(real.blocks[idx].attention), type(real.blocks[idx].ffn)) for idx in made.layer_idx
    ] == [(type(block.attention), type(block.ffn)) for block in small.blocks]
    assert {fault for fault, one in CATALOGUE.items() if applicable(one, real)} <= {
        fault for fault, one in CATALOGUE.items() if applicable(one, small)
    }
    assert (real.rope, real.layernorm_epsilon) == (small.rope, small.layernorm_epsilon)
    assert [real.padded_vocab_size(tp) > real.vocab_size for tp in (1, 2, 4)] == [
        small.padded_vocab_size(tp) > small.vocab_size for tp in (1, 2, 4)
    ]
    assert num_parameters(small) <= num_parameters(real)
    if not name.startswith("drawn"):
        assert num_parameters(small) < 40_000_000


def test_the_twin_of_ultra_has_what_makes_ultra_hard() -> None:
    """Block 0, the widest FFN, empty neighbours, 16 queries a key, by hand."""
    made = make_twin("small", published_config(ULTRA))
    model = read_config(made.toy.config)
    widths = sorted({ffn.ffn_hidden_size for _, ffn in model.blocks if isinstance(ffn, Mlp)})
    real = read_config(published_config(ULTRA))
    assert len(widths) == len({f.ffn_hidden_size for _, f in real.blocks if isinstance(f, Mlp)})
    assert max(widths) == 26 * model.hidden_size
    assert {
        model.num_attention_heads // a.num_query_groups
        for a, _ in model.blocks
        if isinstance(a, Attention)
    } == {16}
    empty = [block == (Absent(), Absent()) for block in model.blocks]
    assert any(a and b for a, b in itertools.pairwise(empty))
    assert model.rope.llama3 == (16.0, 1.0, 4.0, 8192)


def test_neighbours_of_the_twin_are_neighbours_of_the_original() -> None:
    """No pair of kinds comes up that the model lacks, and none is lost."""
    real = read_config(published_config(SUPER))
    small = read_config(make_twin("small", published_config(SUPER)).toy.config)

    def pairs(blocks: Any) -> set[Any]:  # noqa: ANN401 - an Architecture's
        kinds = [tuple(type(part) for part in block) for block in blocks]
        return set(itertools.pairwise(kinds))

    assert pairs(real.blocks) == pairs(small.blocks)


def test_special_tokens_stay_inside_the_smaller_vocabulary() -> None:
    """Equal ids stay equal, in their order, all below the end."""
    config = published_config(SUPER)
    config |= {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}
    found = make_twin("small", config).toy.config
    ids = [found["bos_token_id"], *found["eos_token_id"]]
    assert ids == sorted(set(ids))
    assert max(ids) == found["vocab_size"] - 1


@pytest.mark.parametrize("odd", [[1, None], "x", True, 1.0])
def test_a_special_token_that_is_no_id_is_refused_by_its_field(odd: object) -> None:
    """The bridge does not read it; transformers would not take it."""
    with pytest.raises(InconsistentConfigError) as caught:
        make_twin("small", dict(TOYS["nano-4b"].config) | {"eos_token_id": odd})
    assert caught.value.where == (f"eos_token_id={odd!r}",)


def test_a_twin_that_would_be_large_is_refused_with_its_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody waits days to learn that it does not end."""
    monkeypatch.setattr(twins, "_MOST_PARAMETERS", 1000)
    with pytest.raises(UnsupportedFieldError, match="at most 1,000 can go"):
        make_twin("small", dict(TOYS["nano-4b"].config))


def test_a_model_whose_traits_no_small_one_has_is_refused_by_their_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the best candidate has lost is said."""

    def candidates(config: dict[str, Any], *_: object) -> Iterator[dict[str, Any]]:
        yield config | {"rms_norm_eps": 0.5}

    monkeypatch.setattr(twins, "_candidates", candidates)
    with pytest.raises(UnsupportedFieldError) as caught:
        make_twin("small", dict(TOYS["nano-4b"].config))
    assert list(caught.value.where) == ["norm epsilon"]


def test_a_twin_that_has_lost_a_trait_cannot_be_built() -> None:
    """The toy's own assertion, whoever changes its configuration."""
    toy = make_twin("small", dict(TOYS["51b"].config)).toy
    with pytest.raises(InconsistentConfigError) as caught:
        type(toy)(
            name=toy.name, stands_for=toy.stands_for, properties=toy.properties, common=(),
            config=toy.config | {"rms_norm_eps": 0.5},
        )  # fmt: skip
    assert caught.value.where == ("norm epsilon: 1e-05",)
