"""What the tool costs, measured in one run on one machine: time, memory, and ratios to `cp`.

Everything measured runs in a process of its own, started the way a user starts it, so that start-up
counts, memory is one command's alone, and threads are those it chooses itself.
"""
