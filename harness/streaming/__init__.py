"""A model proved block by block, in memory that does not depend on its size.

segments   what is read at a time: the embedding's rows, an attention, a share of an MLP's width
           or of the vocabulary
reading    the next segment is read, or generated, while the present one is computed with
arena      the one buffer in which module after module of the two models has its parameters
truth      the oracle, a segment at a time
reference  the Hugging Face model, and
megatron   Megatron-Core, the same way
sides      what the walk sees of the three: each fills the one segment and runs it
walk       one pass over the weights carries every probe, free-running and teacher-forced
record     what was measured of each block; and the states to go on from
walking    how a walk is set up: sources, sides, what it may hold, what is kept
explain    where and why the model goes wrong, from what the walk has kept
bench      answers to the checks `config`, `logits` and `blocks`, from the record; and to
           `round_trip` where there is a Megatron checkpoint to compare with
cores      how the oracle and the two models share the machine
progress   how far the walk is, on stderr
"""
