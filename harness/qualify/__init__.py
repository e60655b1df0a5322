"""Qualification of a variant that nobody has seen before, and the bundle that proves it.

twin     the same kinds of blocks in the same order at small sizes, every trait asserted
scope    what is run, derived from the configuration alone: layouts, blocks, cases, faults
origin   whose weights these are, and by which code they were judged
bench    real dimensions are walked through, all else is whole: one bench for both
trial    every fault of the catalogue on the twin, unit by unit, to go on from where it was killed
bundle   evidence, reports, card and sums, written at the end
verdict  what the evidence comes to, recomputed from what was measured
audit    a bundle held against itself and against this code
suites   the entries of `suites/variants/`
"""
