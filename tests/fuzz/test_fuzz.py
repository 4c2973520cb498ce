"""A bounded sample of every kind of random input; a failure names the seed that shows it again."""

from __future__ import annotations

import random

from tests.fuzz.graphs import draw, judge
from tests.fuzz.node_cases import cast_case, node_cases, optimized_case

SEED = random.SystemRandom().randrange(2**31)

GRAPHS, NODES = 60, 120


def test_random_graphs_answer_as_they_did() -> None:
    verdicts = {seed: judge(draw(seed)) for seed in range(SEED, SEED + GRAPHS)}
    wrong = {seed: v.why for seed, v in verdicts.items() if v.kind == "wrong"}
    assert not wrong, "\n".join(f"seed {seed}: {why}" for seed, why in wrong.items())
    assert sum(v.kind in ("equal", "rounding") for v in verdicts.values()) > GRAPHS // 2


def test_node_cases_of_onnx_answer_as_they_did() -> None:
    names = random.Random(SEED).sample(sorted(node_cases()), NODES)
    judged = {name: (optimized_case(node_cases()[name]), cast_case(node_cases()[name])) for name in names}
    wrong = {name: found for name, found in judged.items() if "wrong" in {j.kind for j in found}}
    assert not wrong, f"seed {SEED}: {wrong}"
    assert sum(found.kind == "equal" for found, _ in judged.values()) > NODES // 2
