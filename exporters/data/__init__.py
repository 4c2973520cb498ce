"""Samples for calibration and verification: pictures, arrays, iterables, noise; labels.

It imports models and bundle. One more kind of source is a reader in a file of its own, and a line in
`samples.open_samples`.
"""
