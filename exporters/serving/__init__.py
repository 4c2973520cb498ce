"""What is delivered of a bundle: folders for Triton, and for ONNX Runtime with the provider of TensorRT for RTX.

One more server is a module that takes `servable.Servable` and writes its folder by `release`.
"""
