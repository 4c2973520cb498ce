"""FP16, BF16 and INT8 in the graph, and the data that they need. See README.md beside this file."""
