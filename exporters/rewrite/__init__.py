"""Graph passes: onnx_ir.Model -> onnx_ir.Model."""
