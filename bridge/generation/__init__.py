"""Text from a live Megatron model: greedy or sampled, with a KV cache, over the ranks of a layout.

`decoder` feeds tokens to a model and its cache, `decoding` chooses what follows them (`sampling`),
`text` stands between tokens and words, `source` says where model and tokenizer come from, `launch`
starts the ranks.
"""
