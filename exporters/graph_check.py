"""Two graphs, the same inputs: are the answers the same?

The graphs come from anywhere, so an output may rightly be constant, empty, infinite or no tensor at all. What is judged
is therefore the difference: the same shapes and types, NaN and infinity in the same places, equal integers, and
floating-point numbers within a budget of `deploycli.exporters.verification.compare`. ONNX Runtime runs both node by
node, as written.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploycli.exporters.data.arrays import whole_arrays
from deploycli.exporters.runtime.runtimes import OrtRuntime
from deploycli.exporters.verification.compare import BUDGETS
from deploycli.models.errors import EnvironmentUnsuitable, ExportError, NumericsError, UsageError
from deploycli.models.spec import numpy_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from deploycli.models.spec import TensorInfo

    Input = TensorInfo[int | str | None]
    Feed = dict[str, Any]  # arrays, and lists of arrays where an input is a sequence
    Shapes = Mapping[str, tuple[int, ...]]

BATCHES = (3, 1)
"""Sizes of a symbolic batch, in turn; 1 is not the first, because there all samples are one."""

_IMAGE, _CHANNELS, _LENGTH = 224, 3, 16
"""Sizes of other symbolic axes: height and width [B, C, H, W], channels, all else."""

_HIGHEST = (10, 2)
"""Integers are drawn below these, the smaller one where an index of a small table must be meant."""

_AT_ONCE = 8
"""Samples of a file that are run at a time."""

_NUDGES = 3
"""So often the reference is asked how far its own answers move."""

_TIMES_OWN = 4
"""A difference of so many times that is still rounding: the passes reorder more than the first operation."""

_MOST_OWN = 0.1
"""Beyond this relative error an answer says nothing, whatever amplified it."""

_UNITS = {"fp16": 2.0**-10, "bf16": 2.0**-7}
"""Units in the last place of a graph's least exact arithmetic, relative."""

UNCHECKED = "--check 0 leaves the check out"

RUNNING_REFERENCE, RUNNING_CANDIDATE = "running the graph as it was", "running the optimized graph"


@dataclass(frozen=True)
class OutputCheck:
    """What was seen of one output.

    Attributes:
        name: its name.
        max_rel_error: largest absolute error over the largest reference magnitude, of any run.
        identical: bit for bit, in every run.
        vacuous: why agreement proves little, such as ``zero in every run``; empty where it proves something.
        own_error: the same error of the reference against itself, where its inputs change by one unit in the last
            place; 0 where that was not measured, because the error is within the budget.
    """

    name: str
    max_rel_error: float
    identical: bool
    vacuous: str
    own_error: float = 0.0


@dataclass(frozen=True)
class Check:
    """Both graphs were run, and agree.

    Attributes:
        runs: the inputs of each run, such as ``images:3x3x224x224``.
        budget: ``fp32``, ``fp16`` or ``bf16``: what the error was judged by.
        outputs: one an output.
    """

    runs: tuple[str, ...]
    budget: str
    outputs: tuple[OutputCheck, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the check as JSON values."""
        return asdict(self)


def check_graphs(
    reference: Path,
    candidate: Path,
    *,
    samples: int = 0,
    budget: str = "fp32",
    shapes: Shapes | None = None,
    seed: int = 0,
    feeds: Sequence[Feed] | Path = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Check:
    """Run two ONNX files on the same inputs, random ones where none are given.

    One file is in memory at a time.

    Args:
        reference: the file that is right.
        candidate: the file that is judged.
        samples: number of runs on random inputs.
        budget: key of `BUDGETS`; its largest relative error is the limit.
        shapes: input name -> its shape, where an axis is symbolic.
        seed: of the inputs.
        feeds: the inputs of each run, by name, in place of random ones; or a file of them, see `read_feeds`.
        progress: is told what runs.

    Raises:
        UsageError: a shape that does not fit, or inputs that the reference does not run on.
        EnvironmentUnsuitable: ONNX Runtime cannot load the reference.
        NumericsError: the outputs differ, or the candidate does not run.
    """
    progress(RUNNING_REFERENCE)
    make, expected = answers_of(reference, samples, shapes or {}, seed, feeds)
    progress(RUNNING_CANDIDATE)
    runs, found = [], []
    try:
        with OrtRuntime(candidate, optimize=False) as runtime:
            for feed in make():
                runs.append(" ".join(f"{name}:{_shape_text(value)}" for name, value in feed.items()))
                found.append(runtime.run(feed))
    except ExportError as error:
        raise NumericsError(
            f"the optimized graph does not run, the original does: {error.found}",
            expected="equal outputs",
            hint="--without PASS, to find the pass that is at fault; please report it",
        ) from error
    outputs = [_judge(name, [(e[name], f[name]) for e, f in zip(expected, found, strict=True)]) for name in expected[0]]
    limit = BUDGETS[budget].max_rel_error
    wrong = [f"{name}: {why}" for name, why, _ in outputs if why]
    checks = [seen for _, _, seen in outputs]
    if not wrong and not all(seen.max_rel_error <= limit for seen in checks):
        progress(RUNNING_REFERENCE)
        own = _own_errors(reference, make, expected, budget, seed)
        checks = [seen if seen.max_rel_error <= limit else replace(seen, own_error=own[seen.name]) for seen in checks]
    wrong += [
        f"{seen.name}: relative error {seen.max_rel_error:.3g} exceeds {limit:.3g}{_own_text(seen.own_error)}"
        for seen in checks
        if not seen.max_rel_error <= max(limit, min(_TIMES_OWN * seen.own_error, _MOST_OWN))
    ]
    if wrong:
        raise NumericsError(
            "the optimized graph answers otherwise: output " + "; ".join(wrong),
            expected=f"equal outputs within the {budget.upper()} budget, on {'; '.join(dict.fromkeys(runs))}",
            hint="--without PASS, to find the pass that is at fault; please report it",
        )
    return Check(tuple(runs), budget, tuple(checks))


def answers_of(
    path: Path, samples: int, shapes: Shapes, seed: int, given: Sequence[Feed] | Path
) -> tuple[Callable[[], Iterator[Feed]], list[dict[str, Any]]]:
    """Return what makes the inputs of every run, one at a time, and what the reference answers; see `check_graphs`.

    Raises:
        UsageError: a shape that does not fit, or inputs that the reference does not run on.
        EnvironmentUnsuitable: ONNX Runtime cannot load the reference.
    """
    try:
        runtime = OrtRuntime(path, optimize=False)
    except ExportError as error:
        raise EnvironmentUnsuitable(
            f"the graph cannot be checked: {error.found}", expected="a graph that ONNX Runtime runs", hint=UNCHECKED
        ) from error
    with runtime:
        if given:
            feeds = given if not isinstance(given, Path) else read_feeds(given, runtime.inputs)
            try:
                return lambda: iter(feeds), [runtime.run(feed) for feed in feeds]
            except ExportError as error:
                raise UsageError(
                    f"the graph does not run on the given inputs: {error.found}",
                    expected=", ".join(f"{info.name} {info.dtype} {list(info.shape)}" for info in runtime.inputs),
                ) from error
        for highest in _HIGHEST:
            drawn = partial(_feeds, runtime.inputs, shapes, seed, highest, samples)
            try:
                return drawn, [runtime.run(feed) for feed in drawn()]
            except ExportError as error:
                failure = error
    raise UsageError(
        f"the graph cannot be checked: {failure.found}",
        expected="inputs that the graph as it is runs on",
        hint=f"--shape NAME:1x3x224x224 for an axis that is not fixed; {UNCHECKED}",
    ) from failure


def _own_errors(
    path: Path, feeds: Callable[[], Iterator[Feed]], expected: list[dict[str, Any]], budget: str, seed: int
) -> dict[str, float]:
    """Return the relative error of each output where the reference's inputs change by one unit in the last place.

    A graph that amplifies rounding, such as an Exp of large numbers, answers another correct order of its operations
    with an error of this size. It is 0 where an output changes in kind, or where no input is a floating-point number.
    """
    rng = np.random.default_rng(seed)
    errors = dict.fromkeys(expected[0], 0.0)
    with OrtRuntime(path, optimize=False) as runtime:
        for feed, answers in zip(feeds(), expected, strict=True):
            for _ in range(_NUDGES):
                nudged = runtime.run({name: _nudged(value, budget, rng) for name, value in feed.items()})
                for name, answer in answers.items():
                    _, why, seen = _judge(name, [(answer, nudged[name])])
                    if not why and np.isfinite(seen.max_rel_error):
                        errors[name] = max(errors[name], seen.max_rel_error)
    return errors


def _own_text(error: float) -> str:
    return f" (the original's own by {error:.3g} where its inputs change in their last place)" if error else ""


def _nudged(value: Any, budget: str, rng: np.random.Generator) -> Any:
    """Return an input whose floating-point numbers are one unit in the last place larger or smaller."""
    if isinstance(value, list):
        return [_nudged(one, budget, rng) for one in value]
    if value.dtype.kind != "f":
        return value
    unit = max(float(np.finfo(value.dtype).eps), _UNITS.get(budget, 0.0))
    return (value * (1 + unit * rng.choice([-1.0, 1.0], value.shape))).astype(value.dtype)


def read_feeds(path: Path, inputs: Sequence[Input]) -> list[Feed]:
    """Read the inputs of a few runs from a ``.npz`` file, or from a ``.npy`` file for a graph of one input.

    Where all arrays have as many entries on the first axis as one another, and the graph leaves that axis open, they
    are samples, and run a few at a time; where it fixes it, that many at a time; else the arrays are one run.

    Args:
        path: the file.
        inputs: of the graph.

    Raises:
        UsageError: it cannot be read, or lacks an input.
    """
    arrays = whole_arrays(path, [info.name for info in inputs])
    firsts = {info.shape[0] if info.shape else None for info in inputs}
    counts = {array.shape[0] if array.ndim else 0 for array in arrays.values()}
    if len(firsts) != 1 or len(counts) != 1:
        return [arrays]
    ((first,), (count,)) = (firsts, counts)
    if first is None or count == 0 or first == count:
        return [arrays]
    size = first if isinstance(first, int) else _AT_ONCE
    whole = count - count % size if isinstance(first, int) else count  # what does not fill a fixed batch is left out
    return [
        {name: array[start : start + size] for name, array in arrays.items()} for start in range(0, whole, size)
    ] or [arrays]


# --- inputs ----------------------------------------------------------------------------------------------------------


def _feeds(inputs: tuple[Input, ...], shapes: Shapes, seed: int, highest: int, samples: int) -> Iterator[Feed]:
    """Yield the inputs of each run, the same for the same arguments."""
    given = _given(inputs, shapes)
    rng = np.random.default_rng(seed)
    for i in range(samples):
        sizes: dict[str | None, int] = {}
        for info in inputs:  # the first symbol on axis 0 is the batch, and so is what has no name there
            if info.shape and not isinstance(info.shape[0], int):
                sizes = {info.shape[0]: BATCHES[i % len(BATCHES)], None: BATCHES[i % len(BATCHES)]}
                break
        sizes.update(given)
        yield {info.name: _values(info, _sizes(info, sizes, shapes), rng, highest) for info in inputs}


def _given(inputs: tuple[Input, ...], shapes: Shapes) -> dict[str | None, int]:
    """Return the symbols that the given shapes bind."""
    known = {info.name: info for info in inputs}
    bound: dict[str | None, int] = {}
    for name, shape in shapes.items():
        if name not in known:
            raise UsageError(f"the graph has no input {name}", expected=f"one of {', '.join(known) or 'none'}")
        declared = known[name].shape
        pairs = list(zip(declared, shape, strict=False))
        if len(declared) != len(shape) or any(isinstance(d, int) and d != size for d, size in pairs):
            raise UsageError(
                f"--shape {name}:{'x'.join(map(str, shape))} is no shape of this input",
                expected=f"{name}:{'x'.join('?' if d is None else str(d) for d in declared)}",
            )
        for dim, size in pairs:
            if isinstance(dim, str) and bound.setdefault(dim, size) != size:
                raise UsageError(f"--shape makes the axis {dim} both {bound[dim]} and {size}", expected="one size")
    return bound


def _sizes(info: Input, symbols: Mapping[str | None, int], shapes: Shapes) -> tuple[int, ...]:
    if info.name in shapes:
        return shapes[info.name]
    sizes = []
    for axis, dim in enumerate(info.shape):
        if isinstance(dim, int):
            sizes.append(dim)
        elif dim is not None and dim in symbols:
            sizes.append(symbols[dim])
        elif dim is None and axis == 0:
            sizes.append(symbols.get(None, BATCHES[0]))
        elif len(info.shape) == 4:
            sizes.append({1: _CHANNELS, 2: _IMAGE, 3: _IMAGE}.get(axis, _LENGTH))
        else:
            sizes.append(_LENGTH)
    return tuple(sizes)


def _values(info: Input, shape: tuple[int, ...], rng: np.random.Generator, highest: int) -> Any:
    """Return an input; of one that is optional its value, of a sequence two tensors."""
    *wrappers, kind = info.dtype.rstrip(")").split("(")  # such as optional(seq(tensor(float)))
    value = _array(info.name, numpy_name(kind), shape, rng, highest)
    return [value, value] if "seq" in wrappers else value


def _array(name: str, kind: str, shape: tuple[int, ...], rng: np.random.Generator, highest: int) -> Any:
    if kind == "string":
        return rng.choice(np.array(["a", "b", "ab"], object), shape)
    try:
        dtype = np.dtype(kind)
    except TypeError as error:
        raise UsageError(
            f"the graph cannot be checked: its input {name} has the type {kind}", expected="numbers", hint=UNCHECKED
        ) from error
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if dtype == np.uint8 and len(shape) >= 3:  # pixels
        return rng.integers(0, 256, shape, dtype)
    return rng.integers(0, 2 if dtype.kind == "b" else highest, shape).astype(dtype)


def _shape_text(value: Any) -> str:
    return "x".join(map(str, value.shape)) if isinstance(value, np.ndarray) else f"{len(value)} tensors"


# --- verdict ---------------------------------------------------------------------------------------------------------


def _judge(name: str, pairs: list[tuple[Any, Any]]) -> tuple[str, str, OutputCheck]:
    """Return an output's name, what is wrong with it whatever the budget is, and what was seen."""
    error, identical, proves = 0.0, True, False
    for expected, found in pairs:
        left, right = _flat(expected), _flat(found)
        if len(left) != len(right):
            return name, f"{len(right)} tensors, not {len(left)}", OutputCheck(name, np.inf, False, "")
        for a, b in zip(left, right, strict=True):
            difference = _difference(a, b)
            if isinstance(difference, str):
                return name, difference, OutputCheck(name, np.inf, False, "")
            error = max(error, difference)
            identical = identical and a.tobytes() == b.tobytes()
            proves = proves or bool(a.size and (a.dtype.kind not in "fiub" or np.isfinite(a[a != 0]).any()))
    return name, "", OutputCheck(name, error, identical, "" if proves else "empty, zero or not finite in every run")


def _flat(value: Any) -> list[Any]:
    """Return the tensors of a value; an optional one that is absent has none."""
    if value is None:
        return []
    return [np.asarray(x) for x in value] if isinstance(value, list) else [np.asarray(value)]


def _difference(a: Any, b: Any) -> float | str:
    """Return the relative error, or what is wrong."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{b.dtype}{list(b.shape)} instead of {a.dtype}{list(a.shape)}"
    if a.dtype.kind != "f":
        wrong = int((a != b).sum())
        return f"{wrong} of {a.size} values differ" if wrong else 0.0
    left, right = a.astype(np.float64), b.astype(np.float64)
    usual = np.isfinite(left)
    if not np.array_equal(usual, np.isfinite(right)) or not np.array_equal(left[~usual], right[~usual], equal_nan=True):
        return "NaN or infinity in other places"
    error = float(np.abs(left[usual] - right[usual]).max(initial=0.0))
    scale = float(np.abs(left[usual]).max(initial=0.0))
    return error / scale if scale else (np.inf if error else 0.0)
