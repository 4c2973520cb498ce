"""What lies on disk: a bundle with its manifest, engines and golden outputs, and files written whole or not at all.

Whoever runs, judges or ships what is in a bundle iterates its `onnx_files()` and `engines()`, and whoever writes one
does so in `bundle.new_bundle` or `bundle.extend_bundle`. It imports models, graph and target. One more fact about a
bundle is a field of `manifest.Manifest` with a default, so that older bundles still open.
"""
