"""Latency and throughput of every runtime of a model, side by side. See README.md beside this file."""
