"""ONNX's own backend node tests: every operator with inputs and answers, through optimize and through cast.

A case that ONNX Runtime does not run as it is says nothing of the product. What it runs must run after the passes, and
answer the same; where the graph is FP32, its FP16 form must be near, or refused with a reason.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto

from deploycli.exporters.optimize import load
from deploycli.exporters.passes.any_model import optimized
from deploycli.exporters.precision.insert_casts import cast
from deploycli.exporters.precision.policy import REDUCED_TYPES, Policy
from deploycli.models.errors import DeployError
from tests.exporters.passes.graphs import session

if TYPE_CHECKING:
    from collections.abc import Sequence

RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}

TOLERANCE = {np.dtype(np.float16): 2e-3, np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-12}
"""Error over the largest magnitude; two ulps of FP16, where another order of operations rounds twice."""


@dataclass(frozen=True)
class Judged:
    """What became of a case: ``equal``, ``not run`` by ONNX Runtime as it is, ``random``, ``refused``, or ``wrong``."""

    kind: str
    why: str = ""


@cache
def node_cases() -> dict[str, Any]:
    """Return ONNX's cases by name; collecting them runs the reference code of some thousand operators."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return {case.name: case for case in collect_testcases(None) if case.model is not None}


def optimized_case(case: Any) -> Judged:
    """Judge the passes on a case."""
    ran = _answers(case)
    if isinstance(ran, Judged):
        return ran
    feed, expected = ran
    try:
        model, _ = optimized(_read(case.model))
        found = session(ir.to_proto(model)).run(None, feed)
    except DeployError as error:
        return Judged("refused", str(error))
    except Exception:  # whatever a pass raises is what is looked for
        return Judged("wrong", traceback.format_exc(limit=-4))
    for a, b in zip(expected, found, strict=True):
        if why := difference(a, b):
            return Judged("wrong", why)
    return Judged("equal")


def cast_case(case: Any) -> Judged:
    """Judge the FP16 form of a case that has an FP32 value in it."""
    if not any(v.type.tensor_type.elem_type == TensorProto.FLOAT for v in case.model.graph.input):
        return Judged("not FP32")
    ran = _answers(case)
    if isinstance(ran, Judged):
        return ran
    feed, expected = ran
    try:
        model, _ = optimized(_read(case.model))
        cast(model, Policy(REDUCED_TYPES["fp16"]))
        written = ir.to_proto(model)
    except DeployError as error:
        return Judged("refused", str(error))
    except Exception:
        return Judged("wrong", traceback.format_exc(limit=-4))
    try:
        found = session(written).run(None, feed)
    except Exception as error:
        if "NOT_IMPLEMENTED" in str(error) or "data type is not supported" in str(error):
            return Judged("no FP16 kernel in ONNX Runtime")
        return Judged("wrong", str(error).splitlines()[0])
    for a, b in zip(expected, found, strict=True):
        if isinstance(a, np.ndarray) and a.dtype == np.float32 and np.abs(a[np.isfinite(a)]).max(initial=0.0) > 65504:
            return Judged("beyond FP16")
        if why := difference(a, b, 1e-2):
            return Judged("wrong", why)
    return Judged("near")


def _read(model: onnx.ModelProto) -> ir.Model:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.onnx"
        onnx.save(model, path)
        return load(path)


def _answers(case: Any) -> tuple[dict[str, Any], list[Any]] | Judged:
    if any(node.op_type in RANDOM for node in case.model.graph.node):
        return Judged("random")
    inputs, _ = case.data_sets[0]
    feed = {
        value.name: [np.asarray(x) for x in data] if isinstance(data, list) else np.asarray(data)
        for value, data in zip(case.model.graph.input, inputs, strict=False)
        if data is not None
    }
    try:
        return feed, session(case.model).run(None, feed)
    except Exception as error:
        return Judged("not run", str(error).splitlines()[0])


def difference(a: Any, b: Any, tolerance: float | None = None) -> str:
    """Say in what two answers differ, or nothing."""
    if isinstance(a, list) or a is None or b is None:
        if a is None or b is None:
            return "" if a is b else "an optional value is missing"
        return next((why for x, y in zip(a, b, strict=True) if (why := difference(x, y, tolerance))), "")
    if isinstance(a, ort.OrtValue | str | bytes):
        return ""
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{a.dtype}{a.shape} became {b.dtype}{b.shape}"
    if a.dtype.kind not in "fc":
        return "" if np.array_equal(a, b) else "values differ"
    x, y = a.astype(np.complex128), b.astype(np.complex128)
    finite = np.isfinite(x)
    if not np.array_equal(finite, np.isfinite(y)) and tolerance is None:
        return "other values are not finite"
    both = finite & np.isfinite(y)
    error = np.abs(x[both] - y[both]).max(initial=0.0) / max(np.abs(x[both]).max(initial=0.0), 1e-6)
    return f"off by {error:.1e}" if error > (tolerance or TOLERANCE.get(a.dtype, 1e-5)) else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge every case, print the counts, and what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("optimize", "cast"))
    parser.add_argument("--match", default="", help="only the cases whose name has this in it")
    options = parser.parse_args(arguments)
    failed = False
    for what, judge in (("optimize", optimized_case), ("cast", cast_case)):
        if options.only not in (None, what):
            continue
        found: Counter[str] = Counter()
        for name, case in node_cases().items():
            if options.match not in name:
                continue
            judged = judge(case)
            found[judged.kind] += 1
            if judged.kind == "wrong" or (what == "optimize" and judged.kind == "refused"):
                print(f"{what} {name}: {judged.kind}: {judged.why}", flush=True)
            failed = failed or judged.kind == "wrong"
        print(f"{what}: {sum(found.values())} cases: {dict(found.most_common())}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
