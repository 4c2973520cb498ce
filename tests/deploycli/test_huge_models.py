"""Manifests that name a model far larger than the files beside them: it is refused while it is made."""

from __future__ import annotations

import resource
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from deploycli.models.errors import IntegrityError
from deploycli.models.memory import memory_that_is_left, weights_at_most
from deploycli.models.spec import Weights
from tests.deploycli.commands import assert_refused
from tests.deploycli.conftest import SMALLEST
from tests.exporters.bundle.bundles import SPEC, make
from tests.peers import import_timm

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploycli.conftest import Command


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("swin", {**SMALLEST, "depths": [10**9]}),
        ("swin", {**SMALLEST, "embed_dim": 12_000}),
        ("timm", {"target": "test_vit", "kwargs": {"depth": 10**9}}),
        ("timm", {"target": "test_vit", "kwargs": {"depth": 60_000}}),
        ("timm", {"target": "test_vit", "kwargs": {"embed_dim": 12_000}}),
        ("timm", {"target": "test_vit", "kwargs": {"block_args": [{"deep": 10**9}]}}),
    ],
)
def test_a_manifest_that_names_a_huge_model(
    deploycli: Command, tmp_path: Path, family: str, config: dict[str, Any]
) -> None:
    import_timm()
    make(tmp_path / "artifacts", spec=replace(SPEC, family=family, config=config), weights=Weights("random", seed=0))
    assert_refused(deploycli("verify", "linear"), 8, f"at $.spec.config that make no {family}")


def test_many_classes_are_no_hindrance(deploycli: Command, smallest: str) -> None:
    assert deploycli("export", smallest, "--num-classes", 70_000).code == 0
    assert deploycli("verify", smallest, "--batches", 1).code == 0


def test_weights_are_counted_before_they_have_values() -> None:
    with pytest.raises(IntegrityError, match="more than 1,000 weights"), weights_at_most(1000, "a model"):
        torch.nn.Linear(2**13, 2**13)
    with weights_at_most(1000, "a model"):
        torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.LazyLinear(4), torch.nn.LayerNorm(3, bias=False))
    torch.nn.Linear(100, 100)


def test_memory_that_is_not_there_is_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    monkeypatch.setattr("deploycli.models.memory.available", lambda: 0)
    with pytest.raises(RuntimeError, match="allocate"), memory_that_is_left():
        torch.empty(2**33, dtype=torch.uint8)  # untouched, it takes addresses only
    assert resource.getrlimit(resource.RLIMIT_AS) == before
