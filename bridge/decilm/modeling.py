"""The DeciLM model for transformers: Llama whose every block has its own attention and FFN.

The parameters are named as in the published checkpoints. A sub-block that is a no-op has neither
weights nor a norm; one replaced by a matrix keeps its norm. The arithmetic is that of the
published model, operation by operation, so that it can serve as the reference: a DeciLM whose
blocks are all equal computes what transformers' Llama computes, to the last bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from bridge.decilm.configuration import DeciLMConfig
from bridge.decilm.layers import DeciLMDecoderLayer, DeciLMRMSNorm
from bridge.decilm.masking import causal_mask
from bridge.decilm.rotary import DeciLMRotaryEmbedding
from bridge.spec import GroupedQueryAttention

_TIED: Final = {"lm_head.weight": "model.embed_tokens.weight"}


class DeciLMPreTrainedModel(PreTrainedModel):  # type: ignore[misc]  # transformers is not typed for mypy
    """What the machinery of transformers wants to know, in the words of all its versions."""

    config_class = DeciLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("DeciLMDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _supports_cache_class = True
    _supports_quantized_cache = True
    _supports_static_cache = False  # up to transformers 4.55: one head count for all layers

    def _init_weights(self, module: nn.Module) -> None:
        # torch.nn.init and not `.data`: transformers guards these functions against writing
        # over what a checkpoint has filled.
        std = self.config.initializer_range
        match module:
            case nn.Linear():
                nn.init.normal_(module.weight, mean=0.0, std=std)
            case nn.Embedding():
                nn.init.normal_(module.weight, mean=0.0, std=std)
                if module.padding_idx is not None:
                    nn.init.zeros_(module.weight[module.padding_idx])
            case DeciLMRMSNorm():
                nn.init.ones_(module.weight)
            case _:
                pass


class DeciLMModel(DeciLMPreTrainedModel):
    """Embedding, blocks and final norm.

    Raises:
        ConfigError: BR1xx, on construction: a field that cannot be honoured.
    """

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        spec = config.spec
        self.padding_idx = config.pad_token_id
        self.vocab_size = spec.vocab_size
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size, self.padding_idx)
        layers, num_cached = [], 0
        for layer_idx, block in enumerate(spec.blocks):
            layers.append(
                DeciLMDecoderLayer(
                    config, spec, block, layer_idx=layer_idx, cache_layer_idx=num_cached
                )
            )
            num_cached += isinstance(block.attention, GroupedQueryAttention)
        self.has_attention = num_cached > 0
        self.layers = nn.ModuleList(layers)
        self.norm = DeciLMRMSNorm(spec.hidden_size, spec.layernorm_epsilon)
        self.rotary_emb = DeciLMRotaryEmbedding(spec.rope, spec.kv_channels)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put other word embeddings in place."""
        self.embed_tokens = value

    def forward(  # noqa: PLR0917  # transformers' signature
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,  # noqa: FBT001  # transformers' signature
        output_attentions: bool | None = None,  # noqa: FBT001  # transformers' signature
        output_hidden_states: bool | None = None,  # noqa: FBT001  # transformers' signature
        return_dict: bool | None = None,  # noqa: FBT001  # transformers' signature
        **kwargs: Any,  # noqa: ANN401  # what the attention functions take
    ) -> BaseModelOutputWithPast | tuple[object, ...]:
        """Run the model; arguments and result as in transformers' Llama.

        `hidden_states` has num_layers + 1 entries, the last one behind the final norm.
        `attentions` has num_layers, None where a block has no attention.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        config = self.config
        checkpointing = self.gradient_checkpointing and self.training
        use_cache = _given_or(use_cache, config.use_cache) and not checkpointing
        if checkpointing:  # the second forward would add to a cache what it already holds
            past_key_values = None
        elif use_cache and past_key_values is None:
            past_key_values = DynamicCache()

        cache_position = kwargs.pop("cache_position", None)
        shared: dict[str, Any] = {}
        if self.has_attention:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            if cache_position is None:
                steps = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
                cache_position = steps + past
            if position_ids is None:
                position_ids = cache_position.unsqueeze(0)
            shared = {
                "position_embeddings": self.rotary_emb(inputs_embeds, position_ids),
                "attention_mask": causal_mask(
                    config,
                    inputs_embeds,
                    attention_mask,
                    cache_position=cache_position,
                    past_key_values=past_key_values,
                    position_ids=position_ids,
                ),
                "past_key_values": past_key_values,
                "cache_position": cache_position,
            }

        keep_states = _given_or(output_hidden_states, config.output_hidden_states)
        keep_weights = _given_or(output_attentions, config.output_attentions)
        states: list[Tensor] = []
        all_weights: list[Tensor | None] = []
        hidden_states = inputs_embeds
        for layer in self.layers:
            if keep_states:
                states.append(hidden_states)
            call = partial(layer, position_ids=position_ids, **shared, **kwargs)
            if checkpointing:
                hidden_states, weights = self._gradient_checkpointing_func(call, hidden_states)
            else:
                hidden_states, weights = call(hidden_states)
            if keep_weights:
                all_weights.append(weights)
        hidden_states = self.norm(hidden_states)
        output = BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=(*states, hidden_states) if keep_states else None,
            attentions=tuple(all_weights) if keep_weights else None,
        )
        return output if _given_or(return_dict, config.return_dict) else output.to_tuple()


def _given_or(given: bool | None, default: bool) -> bool:  # noqa: FBT001  # see forward
    return default if given is None else given


class DeciLMForCausalLM(DeciLMPreTrainedModel, GenerationMixin):  # type: ignore[misc]  # transformers is not typed for mypy
    """DeciLM with its output layer; generates with transformers' own caches."""

    # transformers 5 wants to know from where, 4 only what
    _tied_weights_keys = (
        _TIED if hasattr(PreTrainedModel, "get_expanded_tied_weights_keys") else [*_TIED]
    )

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        self.model = DeciLMModel(config)
        self.vocab_size = self.model.vocab_size
        self.lm_head = nn.Linear(self.model.embed_tokens.embedding_dim, self.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put other word embeddings in place."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Put another output layer in place."""
        self.lm_head = value

    def forward(  # noqa: PLR0917  # transformers' signature
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,  # noqa: FBT001  # transformers' signature
        output_attentions: bool | None = None,  # noqa: FBT001  # transformers' signature
        output_hidden_states: bool | None = None,  # noqa: FBT001  # transformers' signature
        return_dict: bool | None = None,  # noqa: FBT001  # transformers' signature
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,  # noqa: ANN401  # what the loss and the attention functions take
    ) -> CausalLMOutputWithPast | tuple[object, ...]:
        """Run the model; arguments and result as in transformers' Llama.

        `labels` (batch, length): the one at t is compared with the logits at t - 1, -100 is left
        out; the loss is the mean over tokens, in nats. `logits_to_keep` is how many positions at
        the end, or which positions, logits are computed for; 0 is all.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if _given_or(return_dict, self.config.return_dict) else output.to_tuple()
