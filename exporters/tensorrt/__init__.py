"""TensorRT: what an ONNX file must be for its parser, and what is made of it."""
