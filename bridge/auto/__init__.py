"""`AutoBridge`: the calls of NVIDIA's Megatron-Bridge, answered by this bridge.

A script written for `megatron.bridge.AutoBridge` changes one import. What each call does here, and
what is refused, stands in `docs/migration.md`; the names were taken from Megatron-Bridge 0.3.1 and
0.6.2.
"""
