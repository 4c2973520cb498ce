"""Readers of samples: pictures, array files, iterables, and noise."""
