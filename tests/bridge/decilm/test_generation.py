"""Generation with transformers' own caches, which know nothing of layers without attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from bridge.decilm import DeciLMForCausalLM

Build = Callable[..., DeciLMForCausalLM]
NEW = 7
TOKENS = torch.randint(1, 128, (2, 11), generator=torch.Generator().manual_seed(3))
HETEROGENEOUS = {
    "block 0 without attention": [(None, 64), (2, 48), (6, None), (3, 64)],
    "block 0 linear": [("linear", 64), (1, 48), ("linear", "linear"), (6, 32)],
    "block 0 empty": [(None, None), (2, 48), (None, None), (3, 64)],
    "attention last": [(None, 64), (None, 32), (6, 32)],
    "attention first": [(3, 32), (None, 64), ("linear", 32)],
    "no attention at all": [(None, 64), ("linear", 32), (None, 48)],
    "every block with its own groups": [(1, 64), (2, 64), (3, 64), (6, 64)],
}


def _by_hand(model: DeciLMForCausalLM, tokens: Tensor) -> Tensor:
    """Greedy decoding that computes everything anew for every token."""
    for _ in range(NEW):
        following = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, following), dim=1)
    return tokens


def _generate(model: DeciLMForCausalLM, tokens: Tensor, **options: object) -> Tensor:
    generated: Tensor = model.generate(
        tokens,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return generated


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("blocks", HETEROGENEOUS.values(), ids=HETEROGENEOUS.keys())
@torch.no_grad()
def test_cached_generation_equals_recomputing_every_step(
    blocks: list[tuple[int, int]], implementation: str, build: Build
) -> None:
    """Also in a batch, and whatever block the first attention is in."""
    model = build(blocks, attn_implementation=implementation)
    assert torch.equal(_by_hand(model, TOKENS), _generate(model, TOKENS))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("blocks", HETEROGENEOUS.values(), ids=HETEROGENEOUS.keys())
@torch.no_grad()
def test_left_padding_changes_nothing(
    blocks: list[tuple[int, int]], implementation: str, build: Build
) -> None:
    """A short prompt padded to its neighbour's length continues as it does alone."""
    model = build(blocks, attn_implementation=implementation)
    short = TOKENS[:1, 4:]
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    batch = TOKENS.masked_fill(mask == 0, 0)
    together = _generate(model, batch, attention_mask=mask)
    assert torch.equal(_by_hand(model, short)[0], together[0, 4:])
    assert torch.equal(_by_hand(model, TOKENS[1:])[0], together[1])


@pytest.mark.parametrize("blocks", HETEROGENEOUS.values(), ids=HETEROGENEOUS.keys())
@torch.no_grad()
def test_a_prompt_in_two_pieces_is_one_prompt(blocks: list[tuple[int, int]], build: Build) -> None:
    """The second piece sees the first through the cache; logits agree to float32's digits."""
    model = build(blocks)
    cache = DynamicCache()
    first = model(TOKENS[:, :6], past_key_values=cache, use_cache=True).logits
    second = model(TOKENS[:, 6:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(
        model(TOKENS).logits, torch.cat((first, second), dim=1), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_the_cache_holds_one_layer_for_each_attention(build: Build) -> None:
    """Blocks without attention take no place, and each layer has its own group count."""
    model = build(HETEROGENEOUS["block 0 without attention"])
    cache = model(TOKENS, use_cache=True).past_key_values
    assert len(cache) == 3
    assert cache.get_seq_length() == TOKENS.shape[1]
    shapes = [entry[0].shape[1] for entry in cache]
    assert shapes == [2, 6, 3]


def test_no_cache_is_made_when_none_is_wanted(build: Build) -> None:
    """By argument or by configuration."""
    model = build([(2, 64)])
    assert model(TOKENS, use_cache=False).past_key_values is None
    model.config.use_cache = False
    assert model(TOKENS).past_key_values is None


@pytest.mark.parametrize("blocks", HETEROGENEOUS.values(), ids=HETEROGENEOUS.keys())
@torch.no_grad()
def test_beam_search_is_the_same_with_and_without_a_cache(
    blocks: list[tuple[int, int]], build: Build
) -> None:
    """Reordering the cache reorders the layers that are filled."""
    model = build(blocks)
    with_cache, without = (
        _generate(model, TOKENS, num_beams=3, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(without, with_cache)


@pytest.mark.parametrize("blocks", HETEROGENEOUS.values(), ids=HETEROGENEOUS.keys())
@torch.no_grad()
def test_a_static_cache_gives_the_same_tokens_or_is_refused(
    blocks: list[tuple[int, int]], build: Build
) -> None:
    """Before 4.56 a static cache has one head count for all layers: transformers refuses it."""
    model = build(blocks)
    major, minor = map(int, transformers.__version__.split(".")[:2])
    if (major, minor) < (4, 56):
        with pytest.raises(ValueError, match="static"):
            _generate(model, TOKENS, cache_implementation="static")
        return
    assert torch.equal(
        _by_hand(model, TOKENS), _generate(model, TOKENS, cache_implementation="static")
    )
