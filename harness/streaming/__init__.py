"""A model proved block by block, in memory that does not depend on its size.

segments   what is read at a time: the embedding's rows, an attention, a share of an MLP's width
           or of the vocabulary
reading    the next segment is read, or generated, while the present one is computed with
sides      the oracle, the reference and Megatron: each fills the one segment and runs it
walk       one pass over the weights carries every probe, free-running and teacher-forced
record     what was measured of each block; and the states to go on from
bench      answers to the checks `blocks` and `logits`, from the record
"""
