"""Latency and throughput of every runtime of a model, side by side: candidates, the clock, figures, requirements.

One more runtime under the clock is a function that yields `candidate.Candidate`, and its line in `run`.
"""
