"""Prove that a conversion was right: three implementations, one verdict."""
