"""What an engine is for: which product of NVIDIA's, which GPUs, which shapes and settings. Data alone.

It imports models. One more GPU is a line in `targets`.
"""
