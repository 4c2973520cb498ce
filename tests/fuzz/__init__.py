"""Random and damaged inputs, in bulk: each module runs a bounded sample in the tests, and as many as asked for by hand.

python -m tests.fuzz.graphs --count 10000 --seed 1
python -m tests.fuzz.node_cases
OMP_NUM_THREADS=1 python -m tests.fuzz.files --count 20000 --seed 1
"""
