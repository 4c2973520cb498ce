"""`--input NAME:SHAPE[:TYPE[:LOW..HIGH]]`, masks among the inputs, and outputs that no file could be compared with."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploycli.exporters.bundle.bundle import Bundle
from deploycli.exporters.bundle.golden import load_golden, synthetic_inputs
from deploycli.models.spec import ModelSpec, TensorSpec
from deploycli.options import INPUT_TYPES, tensor_spec
from tests.deploycli.commands import assert_refused

if TYPE_CHECKING:
    from pathlib import Path

    from tests.deploycli.conftest import Command

MODULES = """
import torch
from torch import nn
from torch.nn import functional as F

class Text(nn.Module):
    '''Tokens of two kinds, attended to where the mask says so.'''
    def __init__(self):
        super().__init__()
        self.words, self.kinds, self.head = nn.Embedding(100, 16), nn.Embedding(2, 16), nn.Linear(16, 3)
    def forward(self, ids, kind, attention_mask):
        x = (self.words(ids) + self.kinds(kind)).unflatten(-1, (2, 8)).transpose(1, 2)
        y = F.scaled_dot_product_attention(x, x, x, (attention_mask > 0)[:, None, None, :])
        y = y.transpose(1, 2).flatten(2)
        return {"": self.head(y).mean(1), "ids": ids, "known": (ids > 3).any(1), "none": None,
                "a": {"b": y}, "a_b": ids * 2}

class Padded(nn.Module):
    '''PyTorch's own fast path answers NaN for a sample that is all padding.'''
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    def forward(self, x, pad):
        return self.layer(x, src_key_padding_mask=pad)

class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.register_buffer("later", torch.ones(3, 3, dtype=torch.bool).triu(1))
    def forward(self, x, keep):
        return self.attention(x, x, x, key_padding_mask=keep == 0, attn_mask=self.later)

class Scores(nn.Module):
    '''A mask that is added to the scores.'''
    def forward(self, x, mask):
        return F.scaled_dot_product_attention(x, x, x, mask)

class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, 4)
    def forward(self, x):
        return self.stem(x.float() / 255).mean((2, 3))

class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 4)
    def forward(self, x, keep):
        return torch.where(keep[:, :4], self.head(x.float()), 0.0)

def half():
    return nn.Linear(8, 4).half()

class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 4)
    def forward(self, x, t):
        return self.head(x) * t[:, None]

class Odd(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.head, self.weight = kind, nn.Linear(8, 4), nn.Parameter(torch.ones(5, 8))
    def forward(self, x):
        y = self.head(x)
        return {"loss": lambda: (y, y.sum()), "weight": lambda: (y, self.weight), "none": lambda: None,
                "pick": lambda: y[y[:, 0] > 0], "nan": lambda: y.log(),
                "turned": lambda: y.T, "same": lambda: (y, x), "whole": lambda: (y, (y * 9).long(), y > 0)}[self.kind]()
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text(MODULES)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own", raising=False)


def exported(deploycli: Command, folder: Path, name: str, *inputs: str, **kwargs: str) -> Bundle:
    options = [part for text in inputs for part in ("--input", text)]
    made = deploycli("export", f"own.py:{name}", "--name", "own", *options, "--model-kwargs", json.dumps(kwargs))
    assert made.code == 0, made.err
    assert deploycli("verify", "own", "--reference", "golden", "--batches", "1,3").code == 0
    return Bundle.open(folder / "artifacts/own")


def test_tokens(deploycli: Command, tmp_path: Path) -> None:
    bundle = exported(
        deploycli, tmp_path, "Text", "ids:1x6:int64:0..99", "kind:1x6:int32:0..1", "attention_mask:1x6:int64"
    )
    assert bundle.manifest.spec.inputs == (
        TensorSpec("ids", (6,), "int64", (0, 99)),
        TensorSpec("kind", (6,), "int32", (0, 1)),
        TensorSpec("attention_mask", (6,), "int64", None, "finite"),
    )
    assert bundle.manifest.spec.outputs == ("output", "ids_output", "known", "a_b", "a_b_2")
    inputs, outputs = load_golden(bundle.golden)
    assert inputs["ids"].max() > 9
    assert not inputs["attention_mask"][1].any()
    assert inputs["attention_mask"][2].all()
    assert np.abs(outputs["a_b"][1]).max() == 0  # as PyTorch answers
    assert outputs["ids_output"].dtype == np.int64
    assert outputs["known"].dtype == bool
    out_of_range = ["--input", "ids:1x6:int64:0..100000", "--input", "kind:1x6:int64:0..1"]
    refused = deploycli("export", "own.py:Text", *out_of_range, "--input", "attention_mask:1x6:int64", "--name", "b")
    assert_refused(refused, 3, "does not run on ids:8x6 int64", "index out of range", "0..N")


@pytest.mark.parametrize(
    ("name", "inputs", "hides"),
    [
        ("Padded", ("x:1x2x16", "pad:1x2:bool"), "high"),  # the model itself answers NaN where all is hidden
        ("Decoder", ("x:1x3x16", "keep:1x3:int64"), "low"),  # and this one where the first token is
        ("Scores", ("x:1x2x5x8", "mask:1x1x5x5"), "infinite"),
        ("Pixels", ("x:1x3x16x16:uint8",), None),
        ("Half", ("x:1x8:float16", "keep:1x8:bool"), "finite"),
        ("Step", ("x:1x8", "t:1:int64:1..1000"), None),
    ],
)
def test_types_and_masks(deploycli: Command, tmp_path: Path, name: str, inputs: tuple[str, ...], hides: str) -> None:
    spec = exported(deploycli, tmp_path, name, *inputs).manifest.spec
    assert [i.dtype for i in spec.inputs] == [[*text.split(":"), "float32"][2] for text in inputs]
    assert spec.inputs[-1].hides == (hides or "")


@pytest.mark.parametrize("kind", ["same", "whole"])
def test_odd_outputs(deploycli: Command, tmp_path: Path, kind: str) -> None:
    exported(deploycli, tmp_path, "Odd", "x:2x8", kind=kind)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("loss", "the output 'output_1' is one number for the whole batch"),
        ("pick", "the first axis of the output 'logits' is not the batch: it has the shape ["),
        ("turned", "the first axis of the output 'logits' is not the batch: it has the shape [4, 8] for 8 samples"),
        ("nan", "the model itself answers NaN or Inf, in PyTorch: "),
        ("weight", "the first axis of the output 'output_1' is not the batch: it has the shape [5, 8] for 8 samples"),
    ],
)
def test_outputs_that_nothing_can_be_compared_with(deploycli: Command, tmp_path: Path, kind: str, says: str) -> None:
    refused = deploycli("export", "own.py:Odd", "--input", "x:2x8", "--model-kwargs", json.dumps({"kind": kind}))
    assert_refused(refused, 3, says, "expected: ", "try: ")
    assert not list((tmp_path / "artifacts").rglob("*.onnx"))


def test_no_output(deploycli: Command) -> None:
    refused = deploycli("export", "own.py:Odd", "--input", "x:2x8", "--model-kwargs", json.dumps({"kind": "none"}))
    assert_refused(refused, 2, "the model returns no tensor", "expected: ")


def test_weights_of_half_precision_are_single_here(deploycli: Command) -> None:
    refused = deploycli("export", "own.py:half", "--input", "x:2x8:float16")
    assert_refused(refused, 3, "does not run on x:8x8 float16", "weights are FP32 here", "--input NAME:SHAPE:float32")


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("x:2x3x4", TensorSpec("x", (3, 4))),
        ("scope:x:2x3", TensorSpec("scope:x", (3,))),
        ("t:2", TensorSpec("t", ())),
        ("ids:2x16:int64:0..30521", TensorSpec("ids", (16,), "int64", (0, 30521))),
        ("d:2x4:int8:-5..-1", TensorSpec("d", (4,), "int8", (-5, -1))),
        ("p:2X4:uint8", TensorSpec("p", (4,), "uint8")),
    ],
)
def test_how_an_input_is_written(text: str, spec: TensorSpec) -> None:
    assert tensor_spec(text) == spec


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "x:", ":2x3", "x:2x0", "x:2x-3", "x:2x3:", "x:2x3:int", "x:2x3:complex64", "x:2x3:bfloat16", "x:int64",
        "x:2x3:0..5", "x:2x3:int64:5..0", "x:2x3:uint8:0..256", "x:2x3:int8:-129..0", "x:2x3:float32:0..5",
        "x:2x3:bool:0..1", "x:2x3:int64:0-5", "x:2x3:int64:0..", "x:2x3:int64:0..9:bool", "int64:0..9",
    ],
)  # fmt: skip
def test_what_is_no_input(deploycli: Command, text: str) -> None:
    with pytest.raises(click.BadParameter) as caught:
        tensor_spec(text)
    assert "\n" not in caught.value.message
    if text == "x:2x3:int":
        assert deploycli("export", "own.py:Pixels", "--input", text).code == 2


@given(
    st.sampled_from(INPUT_TYPES), st.tuples(st.integers(-128, 300), st.integers(0, 300)), st.sampled_from(["x", "mask"])
)
def test_values_stay_in_their_range(dtype: str, ends: tuple[int, int], name: str) -> None:
    low, high = ends[0], sum(ends)
    text = f"{name}:2x3:{dtype}:{low}..{high}"
    try:
        spec = tensor_spec(text)
    except click.BadParameter:
        spec = tensor_spec(f"{name}:2x3:{dtype}")
    array = synthetic_inputs(ModelSpec("m", "m", {}, (spec,)), 8)[name]
    assert array.dtype == spec.dtype
    assert array.shape == (8, 3)
    if spec.values is not None:
        assert array.min() >= low
        assert array.max() <= high
