"""What an engine is for: which product of NVIDIA's, which GPUs, which shapes and settings. Data alone.

It imports models alone. One more GPU is a line in `targets`.
"""
