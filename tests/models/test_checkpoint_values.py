"""Checkpoints edited at random: the model has the very weights of the file, or a sentence names the key."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from deploycli.models.build import family
from deploycli.models.checkpoint import load
from deploycli.models.errors import UsageError
from deploycli.models.values import converted, shown, to_single
from tests.models import swins, vits

if TYPE_CHECKING:
    from deploycli.models.spec import ModelSpec

State = dict[Any, torch.Tensor]

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OTHERS = [
    torch.complex64, torch.complex128, torch.int8, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.bool,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip

SWIN = swins.golden_state(swins.tiny_swin())
VIT = swins.golden_state(vits.tiny_vit())
JAX = {name: torch.from_numpy(array) for name, array in vits.to_jax(VIT).items()}

MODELS: list[tuple[ModelSpec, State]] = [
    (swins.tiny_spec(), SWIN),
    (swins.tiny_spec(), swins.to_timm_names(SWIN)),
    (vits.tiny_spec(), VIT),
    (vits.tiny_spec(), JAX),
]

EDITS = ["nothing", "floats", "other", "value", "key", "sparse", "meta", "expanded"]


def written(state: State, folder: str, form: str, entry: str) -> Path:
    path = Path(folder, f"weights.{form}")
    if form == "safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    elif form == "npz":
        np.savez(path, **{key: value.numpy() for key, value in state.items()})
    else:
        torch.save({entry: state, "epoch": 3} if entry else state, path, _use_new_zipfile_serialization=form == "pth")
    return path


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_exact_weights_or_a_sentence_with_the_key(data: st.DataObject) -> None:
    spec, original = data.draw(st.sampled_from(MODELS), "model")
    kind = family(spec.family)
    prefix = ""
    if original is not JAX:
        prefix = data.draw(st.sampled_from(["", "module.", "model._orig_mod.", "backbone.", "net."]), "prefix")
    state: State = {prefix + name: value for name, value in original.items()}
    key = data.draw(st.sampled_from(list(state)), "key")
    names: set[object] = {key, kind.translate(dict(original))[1].get(key.removeprefix(prefix), key), key[len(prefix) :]}
    value, fits, forms = state[key], True, ["pth", "old", "safetensors", "npz"]
    edit = data.draw(st.sampled_from(EDITS + ["rank"] * (original is not JAX)), "edit")
    match edit:
        case "floats":
            state[key] = value.to(data.draw(st.sampled_from(FLOATS), "type"))
            forms = forms[:3] if state[key].dtype == torch.bfloat16 else forms
        case "other":
            state[key], fits, forms = value.to(data.draw(st.sampled_from(OTHERS), "type")), False, ["pth"]
        case "value":
            found = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e39, 3e38, 1e-60]), "value")
            state[key] = value.double().contiguous()
            state[key].view(-1)[data.draw(st.integers(0, value.numel() - 1), "where")] = found
            fits = abs(found) < 3.4e38
        case "rank":
            state[key], fits = value[None] if data.draw(st.booleans(), "more") else value.sum(), False
        case "sparse":
            state[key], fits, forms = value.to_sparse(), False, ["pth"]
        case "meta":
            state[key], fits, forms = value.to("meta"), False, ["pth"]
        case "expanded":
            state[key], fits, forms = value.flatten()[:1].expand(2**40), False, ["pth"]
        case "key":
            new = data.draw(st.sampled_from([0, b"x", "", f"{prefix}a\x1b[2Jb", f"{key}.more"]), "new key")
            state = {new if name == key else name: value for name, value in state.items()}
            names, fits, forms = {*names, new}, False, ["pth"]
    form = data.draw(st.sampled_from(forms), "form")
    entry = (
        data.draw(st.sampled_from(["", "state_dict", "model_ema", "net"]), "entry") if form in ("pth", "old") else ""
    )
    with tempfile.TemporaryDirectory() as folder:
        path = written(state, folder, form, entry)
        if not fits:
            with pytest.raises(UsageError) as refused:
                load(spec, path)
            assert any(shown(name) in str(refused.value) for name in names)
            assert "".join(str(refused.value).splitlines()).isprintable()
            return
        loaded = load(spec, path)
    expected, _ = kind.translate({name.removeprefix(prefix): value for name, value in state.items()})
    own = loaded.model.state_dict()
    assert expected.keys() == {name for name in own if name.rpartition(".")[2] not in kind.derived}
    assert all(torch.equal(own[name], value.to(torch.float32)) for name, value in expected.items())
    weights = loaded.weights
    assert (weights.prefix, weights.classes, weights.entry) == (prefix, spec.config["num_classes"], entry)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor([1 + 5j]), "bias holds complex numbers (complex64), whose imaginary part would be lost"),
        (torch.tensor([1e300], dtype=torch.float64), "bias holds 1e+300, beyond float32"),
        (torch.tensor([1]), "bias holds integers (int64)"),
        (torch.tensor([True]), "bias holds truth values (bool)"),
        (torch.ones(1).to(torch.float8_e4m3fn), "bias holds float8_e4m3fn numbers, which mean nothing without"),
        (torch.tensor([math.inf]), "bias holds NaN or infinity"),
    ],
)
def test_what_a_weight_cannot_be(value: torch.Tensor, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        converted("bias", value, torch.zeros(1))
    assert message in str(refused.value)
    with pytest.raises(UsageError, match=r"\(b'\\x1b' in the file\)"):
        converted("bias", value, torch.zeros(1), in_file="b'\\x1b'")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_a_counter_takes_whole_numbers_of_any_type(dtype: torch.dtype) -> None:
    like = torch.zeros(1, dtype=dtype)
    for given_as in (torch.float32, torch.float64, torch.int32, torch.uint16, torch.uint64, torch.bool):
        assert converted("count", torch.ones(1).to(given_as), like).equal(torch.ones(1, dtype=dtype))
    for wrong in (torch.tensor([0.5]), torch.tensor([math.nan]), torch.tensor([1j]), torch.tensor([-(2.0**80)])):
        with pytest.raises(UsageError, match="count holds "):
            converted("count", wrong, like)


def test_a_module_is_cast_without_losing_a_part_of_a_number() -> None:
    module = nn.Linear(2, 1).double()
    module.register_buffer("wave", torch.tensor([1 + 5j]))
    module.register_buffer("count", torch.tensor(3))
    cast = to_single(module)
    assert {name: value.dtype for name, value in cast.state_dict().items()} == {
        "weight": torch.float32, "bias": torch.float32, "wave": torch.complex64, "count": torch.int64,
    }  # fmt: skip
    assert cast.state_dict()["wave"].item() == 1 + 5j
    huge = nn.Linear(2, 1).double()
    nn.init.constant_(huge.bias, -1e300)
    with pytest.raises(UsageError, match=r"bias of the model holds -1e\+300, beyond float32"):
        to_single(huge)


def test_a_mask_of_infinities_is_the_models_own() -> None:
    mask = torch.full((2,), -math.inf)
    assert converted("mask", mask.double(), mask).equal(mask)
    with pytest.raises(UsageError, match="mask holds NaN or infinity"):
        converted("mask", mask, torch.zeros(2))
