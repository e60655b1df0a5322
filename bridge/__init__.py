"""Move Llama-Nemotron models between Hugging Face and Megatron-Core, bit for bit.

The package is usable piece by piece; importing it imports no torch.
"""

__version__ = "0.1.0"
