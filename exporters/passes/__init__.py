"""Graph passes: onnx_ir.Model -> onnx_ir.Model, one file a pass, named as the pass.

They import graph alone. One more pass is a file with a `graph_pass.GraphPass`, whose documentation says before ->
after, how exact it is and what it refuses, and its line in `pipeline`, with the reason for its place.
"""
