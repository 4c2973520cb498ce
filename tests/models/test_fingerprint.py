"""Whose the weights are that a user's own function brings."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import torch

from deploycli.models.describe import describe
from deploycli.models.fingerprint import build_factory
from deploycli.models.sources import Source
from deploycli.models.spec import TensorSpec, Weights

if TYPE_CHECKING:
    from pathlib import Path

FACTORIES = """
import random

import numpy as np
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 4), nn.LayerNorm(4)
        self.register_buffer("table", torch.arange(3.0))
    def forward(self, x):
        return self.norm(self.linear(x))

def drawn():
    return Net()

def partly():
    net = Net()
    nn.init.constant_(net.linear.bias, 30.0)
    return net

def trained():
    net = Net()
    generator = torch.Generator().manual_seed(5)
    for p in net.parameters():
        nn.init.normal_(p, generator=generator)
    return net

def empty():
    return nn.Flatten()

def filled():
    net = Net()
    for p in net.parameters():
        nn.init.zeros_(p)
    return net

def elsewhere():
    net = Net()
    with torch.no_grad():
        net.linear.weight.fill_(random.random())
        net.linear.bias.fill_(np.random.random())
    return net

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("sparse", torch.eye(8).to_sparse())
        self.register_buffer("brief", torch.ones((), dtype=torch.bfloat16))
        self.register_buffer("wave", torch.ones(3, dtype=torch.complex64).conj())
        self.register_buffer("nothing", torch.ones(0, 2))
    def get_extra_state(self):
        return {"version": 1}
    def set_extra_state(self, state):
        pass
    def forward(self, x):
        return x * 2
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bring.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "bring", raising=False)
    return tmp_path


def brought(name: str, seed: int = 0) -> Weights:
    spec = describe(Source("factory", f"bring:{name}"), {}, inputs=(TensorSpec("x", (8,)),)).spec
    return build_factory(spec, seed=seed)[1]


@pytest.mark.parametrize(
    ("name", "source", "drawn"),
    [
        ("drawn", "random", 2),  # weight and bias; the LayerNorm starts with ones and zeros
        ("partly", "factory", 1),
        ("trained", "factory", 0),
        ("empty", "factory", 0),
        ("filled", "factory", 0),
        ("Odd", "factory", 0),
    ],
)
def test_weights_that_are_not_all_drawn_are_the_functions_own(name: str, source: str, drawn: int) -> None:
    weights = brought(name)
    assert (weights.source, weights.drawn, weights.seed) == (source, drawn, 0)
    assert weights == brought(name)
    assert (weights.sha256 == brought(name, seed=7).sha256) == (drawn == 0)


def test_all_that_weights_are_drawn_from_is_seeded() -> None:
    import random

    import numpy as np

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.random(), torch.rand(1)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert brought("elsewhere").sha256 == brought("elsewhere").sha256
    assert brought("elsewhere", seed=1).sha256 != brought("elsewhere").sha256
    assert (random.random(), np.random.random(), torch.rand(1)) == expected  # the caller's own state is as it was


def test_weights_are_told_in_one_line() -> None:
    assert Weights("factory", seed=3, sha256="a" * 64).describe() == "weights of the factory (sha256 aaaaaaaaaaaa)"
    partly = Weights("factory", seed=3, sha256="a" * 64, drawn=1)
    assert partly.describe().endswith(", 1 tensor drawn under seed 3")
    assert Weights("random", seed=3, sha256="a" * 64).describe() == "random, seed 3"
    read = Weights("checkpoint", path="x.pth", sha256="b" * 64, classes=10, entry="model_ema", prefix="a\x1b.")
    assert read.describe() == (
        "checkpoint x.pth (sha256 bbbbbbbbbbbb), entry 'model_ema', the EMA, prefix 'a\\x1b.' stripped, 10 classes"
    )
    assert not Weights("checkpoint", entry="schema").averaged
