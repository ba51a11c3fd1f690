"""Speed beside PyTorch and Hugging Face transformers, measured interleaved in one process."""
