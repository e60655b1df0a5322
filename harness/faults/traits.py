"""Which models have what a fault spoils."""

from __future__ import annotations

from bridge.spec import GroupedQueryAttention, Linear, ModelSpec, NoOp, SwiGLU


def groups_of(spec: ModelSpec) -> set[int]:
    """`num_query_groups` of the blocks with attention."""
    return {
        block.attention.num_query_groups
        for block in spec.blocks
        if isinstance(block.attention, GroupedQueryAttention)
    }


def has_attention(spec: ModelSpec) -> bool:
    """Some block has attention."""
    return bool(groups_of(spec))


def has_groups(spec: ModelSpec) -> bool:
    """Some block has two query groups or more."""
    return max(groups_of(spec), default=0) > 1


def has_shared_groups(spec: ModelSpec) -> bool:
    """In some block query heads share a key head, and there is more than one group of them."""
    return any(1 < groups < spec.num_attention_heads for groups in groups_of(spec))


def has_queries_to_share(spec: ModelSpec) -> bool:
    """In some block two query heads or more share a key head."""
    return any(groups < spec.num_attention_heads for groups in groups_of(spec))


def has_swiglu(spec: ModelSpec) -> bool:
    """Some block has a gated feed-forward."""
    return any(isinstance(block.ffn, SwiGLU) for block in spec.blocks)


def has_linear(spec: ModelSpec) -> bool:
    """Some sub-block is replaced by a matrix."""
    return any(Linear() in (block.attention, block.ffn) for block in spec.blocks)


def has_no_linear(spec: ModelSpec) -> bool:
    """None is; only then does Megatron-Core run sequence parallelism."""
    return not has_linear(spec)


def has_no_op(spec: ModelSpec) -> bool:
    """Some sub-block is not there."""
    return any(NoOp() in (block.attention, block.ffn) for block in spec.blocks)


def has_full_block(spec: ModelSpec) -> bool:
    """Some block has both norms."""
    return any(NoOp() not in (block.attention, block.ffn) for block in spec.blocks)


def is_tied(spec: ModelSpec) -> bool:
    """The output layer is the embedding."""
    return spec.share_embeddings_and_output_weights


def is_untied(spec: ModelSpec) -> bool:
    """The output layer has weights of its own."""
    return not is_tied(spec)


def has_twins(spec: ModelSpec) -> bool:
    """Two blocks with a feed-forward of one width."""
    return twins(spec) is not None


def twins(spec: ModelSpec) -> tuple[int, int] | None:
    """The first two blocks whose feed-forwards have one width."""
    seen: dict[int, int] = {}
    for layer_idx, block in enumerate(spec.blocks):
        if isinstance(block.ffn, SwiGLU):
            if block.ffn.ffn_hidden_size in seen:
                return seen[block.ffn.ffn_hidden_size], layer_idx
            seen[block.ffn.ffn_hidden_size] = layer_idx
    return None


def is_square(spec: ModelSpec) -> bool:
    """`linear_proj` is square, so that its transpose fits."""
    return has_attention(spec) and spec.num_attention_heads * spec.kv_channels == spec.hidden_size


def is_scaled(spec: ModelSpec) -> bool:
    """RoPE is llama3-scaled."""
    return spec.rope.scaling is not None and has_attention(spec)


def has_padding(spec: ModelSpec) -> bool:
    """On one rank the vocabulary is padded."""
    return spec.padded_vocab_size(1) > spec.vocab_size


def is_homogeneous(spec: ModelSpec) -> bool:
    """All blocks are alike, so that a block fits in any other's place."""
    return not spec.heterogeneous_block_specs and spec.num_layers > 1


def is_heterogeneous(spec: ModelSpec) -> bool:
    """A DeciLM."""
    return spec.heterogeneous_block_specs


def has_unequal_groups(spec: ModelSpec) -> bool:
    """Blocks differ in their query groups."""
    return len(groups_of(spec)) > 1


def has_transposable(spec: ModelSpec) -> bool:
    """Some matrix is square, so that its transpose fits."""
    return is_square(spec) or has_linear(spec)
