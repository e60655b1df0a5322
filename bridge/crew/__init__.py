"""Processes that do one conversion together, each writing files of its own.

Every process runs the same function with a `Crew` that says which of them it is. No tensor crosses
between processes: what they exchange are paths, digests and counts. The first of them, rank 0, is
the one that the user talks to: it alone creates and places the directory, shows progress and
reports.
"""
