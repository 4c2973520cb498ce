"""Small networks of which one channel grows out of FP16, as of DINOv2 and SigLIP: exported, and cast with their data.

    python -m tests.exporters.precision.outliers

prints what FP16 makes of them, with repairs and without.
"""

from __future__ import annotations

import copy
import itertools
import os
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from deploycli.exporters.bundle.files import temporary_folder
from deploycli.exporters.passes.common.names import name_nodes
from deploycli.exporters.passes.pipeline import rewrite
from deploycli.exporters.precision.insert_casts import cast
from deploycli.exporters.precision.policy import REDUCED_TYPES, Policy
from deploycli.exporters.precision.rescale import rescale
from deploycli.exporters.trace import MODULE_KEY, trace
from deploycli.models.outputs import output_names
from deploycli.models.spec import TensorSpec
from tests.exporters.passes.test_foreign_export import randomized
from tests.exporters.precision.casts import simulated
from tests.exporters.precision.networks import normal, proto_of, ranges
from tests.models.vits import tiny_vit
from tests.peers import import_timm
from tests.shared import shared

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from deploycli.exporters.graph.steps import Remark

Array = Any  # arrays of any type, in tests

CHANNEL = 3
IMAGES = {"images": normal(2, 3, 32, 32, seed=7)}

_SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


def timm(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomized(import_timm().create_model(name, **_SMALL))


class MLP(nn.Module):
    """Two products of rows of 32 channels, whose hidden numbers reach 1e5, and an activation between them."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.act = nn.LayerNorm(32), act
        self.fc1, self.fc2, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 5)
        for layer in (self.fc1, self.fc2, self.head):
            nn.init.normal_(layer.weight, std=0.2)
        with torch.no_grad():
            self.fc1.weight[CHANNEL] *= 1e5
            self.fc2.weight[:, CHANNEL] *= 1e-5

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.act(self.fc1(self.norm(images.flatten(2)[:, :, :32])))
        found: torch.Tensor = self.head(self.fc2(hidden))
        return found


def with_outlier(model: nn.Module, size: float) -> nn.Module:
    """Let one channel of one token reach ``size`` behind the first block, as trained networks do.

    The token is marked in its position embedding; one hidden unit of the MLP finds the mark, and no other token has it.
    """
    mark, token = 5, 6
    mlp = model.get_submodule("blocks.0.mlp")
    state = {**dict(model.named_parameters()), **{f"mlp.{name}": value for name, value in mlp.named_parameters()}}
    with torch.no_grad():
        state["pos_embed"][0, token, mark] = 50
        state["mlp.fc1.weight"][0] = 0
        state["mlp.fc1.weight"][0, mark], state["mlp.fc1.bias"][0] = 100, -400
        for _ in range(3):  # what else the block adds to the channel is not scaled
            state["mlp.fc2.weight"][CHANNEL, 0] *= size / _largest(model.eval(), "blocks.0")
    return model


def _largest(model: nn.Module, name: str) -> float:
    """Return the largest magnitude that a module gives in the channel."""
    seen: list[float] = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda _module, _args, out: seen.append(float(out[..., CHANNEL].abs().max()))
    )
    model(torch.from_numpy(IMAGES["images"]))
    hook.remove()
    return max(seen)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: with_outlier(tiny_vit(embed_dim=32, num_heads=2), 1e5),
    "dinov2": lambda: with_outlier(timm("vit_small_patch14_reg4_dinov2"), 1e5),
    "siglip": lambda: with_outlier(timm("vit_base_patch16_siglip_224"), 8e4),
    "relu": lambda: MLP(nn.ReLU()),
    "gelu": lambda: MLP(nn.GELU()),
}
FORMS: Mapping[str, frozenset[str]] = {
    "in place": frozenset(),
    "as before": frozenset({"fold-bias", "tokens-first"}),
}
"""How a network is exported -> passes left out."""


@cache
def exported(name: str, form: str) -> bytes:
    return shared(f"{name} with an outlier, {form}.onnx", lambda: _export(NETWORKS[name](), FORMS[form]))


def _export(module: nn.Module, without: frozenset[str]) -> bytes:
    inputs = [TensorSpec("images", (3, 32, 32))]
    model = trace(module.eval(), inputs, output_names(module, inputs), opset=20)
    rewrite(model, without=without)
    name_nodes(model, MODULE_KEY)
    return proto_of(model).SerializeToString()


@dataclass(frozen=True)
class Cast:
    """A network in FP16."""

    source: onnx.ModelProto
    proto: onnx.ModelProto
    remarks: tuple[Remark, ...]

    @property
    def casts(self) -> int:
        return sum(node.op_type == "Cast" for node in self.proto.graph.node)

    @property
    def fp32_products(self) -> list[str]:
        """Products that do not multiply FP16."""
        inferred = onnx.shape_inference.infer_shapes(self.proto, check_type=True, strict_mode=True).graph
        half = {v.name for v in (*inferred.value_info, *inferred.output) if v.type.tensor_type.elem_type == 10}
        return [n.name for n in self.proto.graph.node if n.op_type in ("MatMul", "Conv", "Gemm")
                and n.output[0] not in half]  # fmt: skip

    @property
    def too_large(self) -> int:
        """Operators that stay FP32 because of how large values are."""
        return sum(len(self.said(rule)) for rule in ("constant", "overflow", "range"))

    @property
    def error(self) -> float:
        """The largest error over the largest number of the answer in float64."""
        truth = double(self.source, IMAGES)
        found = simulated(self.proto, **IMAGES)
        return max(float(np.abs(found[n] - truth[n]).max() / np.abs(truth[n]).max()) for n in truth)

    def said(self, rule: str) -> list[str]:
        return [f"{r.node}: {r.reason}" for r in self.remarks if r.reason.startswith(f"{rule}:")]


def cast_with_data(name: str, form: str, *, repair: bool, data: bool = True) -> Cast:
    proto = onnx.load_from_string(exported(name, form))
    model = ir.from_proto(copy.deepcopy(proto))
    policy = Policy(REDUCED_TYPES["fp16"], magnitudes=ranges(model, IMAGES) if data else {})
    remarks: list[Remark] = []
    if repair:
        policy, remarks = rescale(model, policy)
    remarks += cast(model, policy)
    return Cast(proto, proto_of(model), tuple(remarks))


def double(proto: onnx.ModelProto, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run a graph of FP32 in float64, in ONNX's reference: ONNX Runtime has no Conv of that type."""
    wide = copy.deepcopy(proto)
    graph = wide.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    del graph.value_info[:]
    fed = {name: value.astype(np.float64) if value.dtype == np.float32 else value for name, value in inputs.items()}
    names = [value.name for value in graph.output]
    return dict(zip(names, ReferenceEvaluator(wide).run(names, fed), strict=True))


def main() -> None:
    """Print a line for each network and form."""
    print("                    all FP16   without repairs: FP32 operators, products, error   with repairs")
    with temporary_folder() as folder:
        os.environ["DEPLOYCLI_TESTS"] = str(folder)
        for name, form in itertools.product(NETWORKS, FORMS):
            blind = cast_with_data(name, form, repair=False, data=False)
            before, after = (cast_with_data(name, form, repair=repair) for repair in (False, True))
            cells = [f"{each.too_large:2} {len(each.fp32_products):2} {each.error:9.1e}" for each in (before, after)]
            print(f"{name:8} {form:10} {blind.error:8.1e} {cells[0]:>24} {cells[1]:>24}")


if __name__ == "__main__":
    main()
