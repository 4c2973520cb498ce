"""Reference PyTorch models: registry, checkpoints, preprocessing. Importing this package imports nothing heavy."""
