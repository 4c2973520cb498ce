"""Precision in the graph: FP16, BF16 and INT8 as element types and Q/DQ pairs, and the data that they need.

It imports lint, for the types that TensorRT has, and what is below it. One more rule of what stays FP32 is a function
and its line in `policy.RULES`; one more calibration method is a function and its line in `methods.METHODS`.
"""
