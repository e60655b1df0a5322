"""The arithmetic of the model, against transformers' Llama and against a few lines of torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from bridge.decilm import DeciLMConfig, DeciLMForCausalLM

Build = Callable[..., DeciLMForCausalLM]
TOKENS = torch.randint(1, 128, (2, 17), generator=torch.Generator().manual_seed(5))
FAR = torch.cat((torch.arange(9), torch.arange(131064, 131072))).unsqueeze(0)


def _llama_of(model: DeciLMForCausalLM, *, groups: int, width: int) -> LlamaForCausalLM:
    """The library's own model of the same dimensions, filled by name where a name exists."""
    config = model.config
    rope = {key: value for key, value in config.rope_scaling.items() if key != "rope_theta"}
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=width,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=groups,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            rope_scaling=rope,
            tie_word_embeddings=config.tie_word_embeddings,
            bos_token_id=128,
            eos_token_id=129,
            attn_implementation=config._attn_implementation,
        )
    ).eval()
    missing, unexpected = llama.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    with torch.no_grad():
        for name in missing:  # what a no-op block lacks must not contribute
            llama.get_parameter(name).zero_()
    return llama


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_equal_blocks_compute_what_llama_computes_bit_for_bit(
    implementation: str, groups: int, build: Build
) -> None:
    """Logits at short and far positions, and greedy generation, in float32."""
    model = build([(groups, 80)] * 3, attn_implementation=implementation)
    llama = _llama_of(model, groups=groups, width=80)
    with torch.no_grad():
        assert torch.equal(llama(TOKENS).logits, model(TOKENS).logits)
        far = [either(TOKENS, position_ids=FAR).logits for either in (llama, model)]
        assert torch.equal(*far)
    generated = [
        either.generate(TOKENS, max_new_tokens=8, do_sample=False, pad_token_id=0)
        for either in (llama, model)
    ]
    assert torch.equal(*generated)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_equal_blocks_compute_what_llama_computes_in_bfloat16(
    implementation: str, build: Build, tmp_path: Path
) -> None:
    """Where the norm casts down and where the softmax does shows only in a short dtype."""
    model = build([(2, 80)] * 3, attn_implementation=implementation)
    llama = _llama_of(model, groups=2, width=80)
    llama.save_pretrained(tmp_path)
    half = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    inv_freq = half.model.rotary_emb.inv_freq
    half.to(torch.bfloat16)
    half.model.rotary_emb.inv_freq = inv_freq.float()
    with torch.no_grad():
        assert torch.equal(half(TOKENS).logits, model.to(torch.bfloat16)(TOKENS).logits)


def test_hidden_states_and_attentions_are_those_of_llama(build: Build) -> None:
    """One state per block and the last behind the norm; one weight matrix per block."""
    model = build([(2, 80)] * 3)
    llama = _llama_of(model, groups=2, width=80)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    expected, found = llama(TOKENS, **wanted), model(TOKENS, **wanted)
    for kind in ("hidden_states", "attentions"):
        for want, have in zip(getattr(expected, kind), getattr(found, kind), strict=True):
            assert torch.equal(want, have)


def test_a_no_op_is_a_sub_block_that_adds_nothing(build: Build) -> None:
    """A Llama with zeroed weights where DeciLM has no-ops gives the same logits."""
    model = build([(None, 80), (2, None), (None, None), (2, 80)])
    llama = _llama_of(model, groups=2, width=80)
    expected, found = (either(TOKENS, output_attentions=True) for either in (llama, model))
    assert torch.equal(expected.logits, found.logits)
    assert found.attentions[0] is None
    assert found.attentions[2] is None
    assert torch.equal(expected.attentions[3], found.attentions[3])


def test_a_no_op_has_neither_weights_nor_norm(build: Build) -> None:
    """The names are those of the published checkpoints, none more and none less."""
    model = build([(None, 80), (2, None), (None, None), ("linear", "linear")])
    attention = ["input_layernorm", *(f"self_attn.{kind}_proj" for kind in "qkvo")]
    ffn = ["post_attention_layernorm", *(f"mlp.{kind}_proj" for kind in ("gate", "up", "down"))]
    linear = [
        "input_layernorm", "self_attn.linear_attn", "post_attention_layernorm", "mlp.linear_mlp",
    ]  # fmt: skip
    per_layer = [ffn, attention, [], linear]
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} | {
        f"model.layers.{layer_idx}.{part}.weight"
        for layer_idx, parts in enumerate(per_layer)
        for part in parts
    }
    assert expected == set(model.state_dict())
    assert not list(model.buffers())


def _norm(states: Tensor, weight: Tensor) -> Tensor:
    return weight * states / (states.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def test_a_linear_replacement_is_one_matrix_behind_its_norm(build: Build) -> None:
    """Against the same computation written out, in float64."""
    model = build([("linear", "linear"), ("linear", 80)]).double()
    weights = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    states = weights["embed_tokens.weight"][TOKENS]
    for layer in ("layers.0", "layers.1"):
        normed = _norm(states, weights[f"{layer}.input_layernorm.weight"])
        states = states + normed @ weights[f"{layer}.self_attn.linear_attn.weight"].T
        normed = _norm(states, weights[f"{layer}.post_attention_layernorm.weight"])
        if layer == "layers.0":
            states = states + normed @ weights[f"{layer}.mlp.linear_mlp.weight"].T
            continue
        gate = normed @ weights[f"{layer}.mlp.gate_proj.weight"].T
        up = normed @ weights[f"{layer}.mlp.up_proj.weight"].T
        silu = gate / (1 + torch.exp(-gate))
        states = states + (silu * up) @ weights[f"{layer}.mlp.down_proj.weight"].T
    expected = _norm(states, weights["norm.weight"]) @ weights["lm_head.weight"].T
    # The norms compute in float32 by definition, so float64 agrees to float32's digits only.
    torch.testing.assert_close(expected, model(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_loss_and_gradients_are_those_of_llama(implementation: str, build: Build) -> None:
    """Every parameter's gradient, bit for bit."""
    model = build([(2, 80)] * 2, attn_implementation=implementation).train()
    llama = _llama_of(model, groups=2, width=80).train()
    losses = [either(TOKENS, labels=TOKENS).loss for either in (llama, model)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    expected = dict(llama.named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(expected[name].grad, weight.grad), name


def test_gradient_checkpointing_changes_no_gradient(build: Build) -> None:
    """Even when a cache is asked for, which computing twice would spoil."""
    gradients = []
    for checkpointing in (False, True):
        model = build([(None, 32), (2, 80), ("linear", None)]).train()
        if checkpointing:
            model._set_gradient_checkpointing()  # what every version's public name calls
            assert model.model.gradient_checkpointing
        model(TOKENS, labels=TOKENS, past_key_values=DynamicCache()).loss.backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_logits_to_keep_gives_the_logits_of_these_positions(build: Build) -> None:
    """A count from the end, or indices."""
    model = build([(2, 80)])
    logits = model(TOKENS).logits
    torch.testing.assert_close(logits[:, -3:], model(TOKENS, logits_to_keep=3).logits)
    some = torch.tensor([0, 5])
    torch.testing.assert_close(logits[:, some], model(TOKENS, logits_to_keep=some).logits)


def test_embeddings_given_directly_count_as_tokens(build: Build) -> None:
    """And exactly one of the two is wanted."""
    model = build([(2, 80)])
    embedded = model.get_input_embeddings()(TOKENS)
    assert torch.equal(model(TOKENS).logits, model(inputs_embeds=embedded).logits)
    with pytest.raises(ValueError, match="exactly one"):
        model(TOKENS, inputs_embeds=embedded)


def test_a_tuple_is_returned_on_request(build: Build) -> None:
    """`return_dict=False` gives loss and logits first."""
    model = build([(2, 80)])
    loss, logits, *_ = model(TOKENS, labels=TOKENS, return_dict=False)
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    torch.testing.assert_close(expected, loss)


def test_tied_embeddings_are_one_tensor(build: Build, tmp_path: Path) -> None:
    """They are stored once and are one again after loading."""
    model = build([(2, 80)], tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = DeciLMForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(model(TOKENS).logits, again(TOKENS).logits)


def test_initial_weights_follow_the_configuration(
    config_fields: Callable[..., dict[str, object]],
) -> None:
    """Matrices have the standard deviation asked for, norms are one."""
    model = DeciLMForCausalLM(
        DeciLMConfig(**config_fields([(2, 80), ("linear", "linear")], initializer_range=0.3))
    )
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert torch.equal(torch.ones_like(weight), weight), name
        else:
            assert 0.27 < weight.std() < 0.33, name


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("Llama-3_3-Nemotron-Super-49B-v1", 49_867_145_216, 568),
        ("Llama-3_3-Nemotron-Super-49B-v1_5", 49_867_145_216, 568),
        ("Llama-3_1-Nemotron-Ultra-253B-v1", 253_401_268_224, 647),
    ],
)
def test_published_models_have_their_published_size(
    name: str, parameters: int, tensors: int, variants: Path
) -> None:
    """Parameters as the model cards state them, built on the meta device."""
    config = DeciLMConfig(**json.loads((variants / f"{name}.json").read_text()))
    with torch.device("meta"):
        model = DeciLMForCausalLM(config)
    assert parameters == sum(weight.numel() for weight in model.parameters())
    assert tensors == len(model.state_dict())
