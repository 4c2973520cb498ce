"""NVIDIA's compilers, and their engines. See README.md beside this file."""
