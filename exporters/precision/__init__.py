"""Precision in the graph: FP16 and INT8 as element types and Q/DQ pairs, and the data that they need."""
