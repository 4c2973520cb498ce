"""A bounded sample of every kind of random input; a failure names the seed that shows it again."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

from tests.fuzz.graphs import draw, judge
from tests.fuzz.node_cases import cast_case, node_cases, optimized_case

ROOT = Path(__file__).parents[2]
SEED = random.SystemRandom().randrange(2**31)

GRAPHS, NODES, FILES = 30, 60, 8


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


def test_damaged_files_end_as_documented() -> None:
    command = [sys.executable, "-m", "tests.fuzz.files", "--count", str(FILES), "--seed", str(SEED)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{FILES} runs in" in done.stdout
