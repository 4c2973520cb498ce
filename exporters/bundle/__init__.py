"""What lies on disk: a bundle with its manifest, engines and golden outputs, and files written whole or not at all.

It imports models, graph and target. One more fact about a bundle is a field of `manifest.Manifest` with a default, so
that older bundles still open.
"""
