"""NVIDIA's compilers: engines built in a child process, read, run; the parser as a judge.

It imports target, lint, precision and runtime; nothing but `device`, `runtime` and what runs in a child imports
NVIDIA's libraries. `compilers` has what differs between TensorRT and TensorRT for RTX: one more compiler is a module
there.
"""
