"""What lies on disk: the bundle of a model with manifest and golden outputs, and files written whole or not at all.

It imports graph and models. One more fact about a bundle is a field of `manifest.Manifest` with a default, so that
older bundles still open.
"""
