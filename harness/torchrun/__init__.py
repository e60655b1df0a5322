"""Rank processes that torchrun has places for, on one host or on several.

Every process that torchrun starts keeps one rank process, its child. The first of them, the lead,
runs the command; the others, keepers, do for their rank what the lead asks over a connection:
start, task, kill. So a rank that throws, dies or hangs ends as it does on one host, without a
process of torchrun ending, and the next case finds new ranks.
"""
