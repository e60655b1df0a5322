"""Fuzzing: damaged and hostile bytes for everything that the project reads.

    kinds.py     the table: which file, how its bytes are mutated, what reads it
    world.py     small real checkpoints, reports and other files, to be mutated
    mutation.py  from (kind, seed, index) to an input; the same bytes every time
    worker.py    one process that reads a range of inputs
    run.py       the processes, their deaths and hangs, what was found

An input may be accepted, or refused by a `BridgeError`. Anything else is a finding: another
exception, an exit, a signal, too long, too much memory, a payload that ran.
"""
