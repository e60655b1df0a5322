"""Brute force against the promise that no kill and no error loses data or leaves half a checkpoint.

A trial is a conversion of a toy by the command line itself, in a process that dies, or is told of a
failure, at one chosen call of the operating system; what it leaves is held against what is
promised. Nothing in the product knows of it.
"""
