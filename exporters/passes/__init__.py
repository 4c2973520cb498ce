"""Graph passes: onnx_ir.Model -> onnx_ir.Model, one file a pass, named as the pass. See README.md beside this file."""
