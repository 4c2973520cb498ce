"""The translations that are looked up for one program are those of PyTorch's own registry."""

from __future__ import annotations

import math
import operator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deploycli.exporters.trace import OPSETS, _translations_of

_registration = pytest.importorskip("torch.onnx._internal.exporter._registration")


def registered(registry: Any, target: Any) -> list[tuple[Any, ...]]:
    return [
        (meta.onnx_function, meta.signature, meta.is_complex, meta.is_custom, meta.opset_introduced)
        for meta in registry.get_decomps(target)
    ]


def calls(*targets: Any) -> Any:
    return [SimpleNamespace(op="call_function", target=target) for target in targets]


@pytest.mark.parametrize("opset", [OPSETS.start, OPSETS.stop - 1])
def test_they_are_those_of_the_whole_registry(opset: int) -> None:
    whole = _registration.ONNXRegistry.from_torchlib(opset_version=opset)
    targets = [metas[0].fx_target for metas in whole.functions.values()]
    assert len(targets) > 400
    found = _translations_of(calls(*targets), opset)
    assert found.opset_version == whole.opset_version == opset
    assert found.functions.keys() == whole.functions.keys()
    for target in targets:
        # A signature is made anew each time, of the function that is compared here.
        assert [m[:1] + m[2:] for m in registered(found, target)] == [m[:1] + m[2:] for m in registered(whole, target)]


def test_only_those_of_the_program_are_looked_up() -> None:
    aten = torch.ops.aten
    found = _translations_of(calls(aten.view.default, aten.add.Tensor, operator.lshift, math.floor), 20)
    for target in (aten.view.default, aten.add.Tensor, operator.lshift, math.floor):
        assert found.is_registered(target)
    for target in (aten.permute.default, operator.rshift):
        assert not found.is_registered(target)


def test_what_has_no_translation_is_not_found() -> None:
    target = torch.ops.aten._linalg_svd.default
    assert not _translations_of(calls(target, len), 20).is_registered(target)
