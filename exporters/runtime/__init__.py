"""What runs a model on named arrays: PyTorch and ONNX Runtime; and functions in a process of their own.

It imports models. One more runtime is a class that has the methods of `runtimes.Runtime`.
"""
