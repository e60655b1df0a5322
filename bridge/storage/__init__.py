"""Where tensors come from and go to: files of Hugging Face, of Megatron, and of nobody."""
