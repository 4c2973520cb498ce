"""Reference PyTorch models, and how their weights are found. See README.md beside this file."""
