"""An accuracy budget: take out of INT8 or FP8 what hurts most, until the top-1 that is lost fits.

The groups are ranked by a cheap proxy: how far the logits move, on a few samples, when one group alone is quantised
(`GatedRuntime`: one graph in which every group has a switch). How many of the worst must go is then found by evaluating
all samples with the very graph that would be written: 1, 2, 4, ... until the drop fits, and halves from there. Where
accuracy does not rise with every group that goes, more than the fewest may go; what is returned was evaluated, and
fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from deploycli.exporters.bundle.files import temporary_folder
from deploycli.exporters.graph.onnx_file import write_model
from deploycli.exporters.graph.unique import Names, value_names
from deploycli.exporters.precision.insert_qdq import Inserter
from deploycli.exporters.precision.number_format import INT8, NumberFormat
from deploycli.exporters.runtime.runtimes import Closing, OrtRuntime
from deploycli.exporters.verification.accuracy import Accuracy, AccuracyMeter
from deploycli.models.errors import NumericsError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import numpy.typing as npt

    from deploycli.exporters.precision.options import Labelled
    from deploycli.exporters.precision.placement import Placement
    from deploycli.exporters.runtime.runtimes import Runtime

    Array = npt.NDArray[Any]
    Inputs = Mapping[str, Array]
    Progress = Callable[[str, int, int], None]


_BATCH = 8
_ROUNDING = 1e-9  # 0.7 % is less than 7 of 1000 by a rounding


@dataclass(frozen=True)
class Search:
    """What an accuracy budget led to.

    Attributes:
        fp32: accuracy of the FP32 graph.
        quantized: accuracy with everything in INT8.
        result: accuracy with ``kept`` in INT8.
        kept: groups that stay in INT8, in the order of the graph.
        reverted: groups that do not, the most harmful first.
        harm: group -> mean square of the movement of the logits over their mean square, when it alone is in INT8;
            empty where nothing had to be reverted.
    """

    fp32: Accuracy
    quantized: Accuracy
    result: Accuracy
    kept: tuple[str, ...]
    reverted: tuple[str, ...]
    harm: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return the search as JSON values."""
        return {
            "fp32": self.fp32.to_json(),
            "quantized": self.quantized.to_json(),
            "result": self.result.to_json(),
            "kept": list(self.kept),
            "reverted": list(self.reverted),
            "harm": dict(self.harm),
        }


def fit(
    groups: Sequence[str],
    max_drop: float,
    *,
    evaluate: Callable[[Collection[str]], Accuracy],
    harm: Callable[[], Mapping[str, float]],
    title: str = "INT8",
) -> Search:
    """Find few of the most harmful groups without which the drop fits.

    It evaluates at most ``2 log2 n + 3`` times.

    Args:
        groups: all groups, in the order of the graph.
        max_drop: largest loss of top-1, as a share.
        evaluate: accuracy with these groups quantised; with none of them it is the FP32 graph's.
        harm: ranks the groups; called only where something must be reverted.
        title: of the format that is quantised to.

    Raises:
        NumericsError: no group can be quantised.
    """
    fp32, quantized = evaluate(()), evaluate(groups)
    if _fits(fp32, quantized, max_drop):
        return Search(fp32, quantized, quantized, tuple(groups), (), {})
    ranks = harm()
    worst = sorted(groups, key=lambda group: -ranks[group])
    found: dict[int, Accuracy] = {len(worst): fp32}  # how many are reverted -> the accuracy, where the drop fits

    def fits(count: int) -> bool:
        accuracy = found.get(count) or evaluate([group for group in groups if group not in worst[:count]])
        if _fits(fp32, accuracy, max_drop):
            found[count] = accuracy
        return count in found

    few, many = 0, 1
    while not fits(many):
        few, many = many, min(2 * many, len(worst))
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if fits(middle) else (middle, many)
    if many == len(worst):
        raise NumericsError(
            f"{worst[-1]}, which hurts least of {len(worst)}, alone in {title} loses more than {max_drop:.2%} of top-1",
            expected=f"a part of the network that bears {title}",
            hint="a larger --max-drop, more calibration data, or another --method",
        )
    reverted = tuple(worst[:many])
    return Search(fp32, quantized, found[many], tuple(g for g in groups if g not in reverted), reverted, ranks)


def _fits(before: Accuracy, after: Accuracy, max_drop: float) -> bool:
    return (before.top1_correct - after.top1_correct) / before.samples <= max_drop + _ROUNDING


def accuracy_of(runtime: Runtime, labelled: Labelled, *, batch: int | None, label: str, progress: Progress) -> Accuracy:
    """Count how often a model is right.

    Args:
        runtime: runs it.
        labelled: data, and which output names the class.
        batch: its batch size, where that is fixed.
        label: what progress says.
        progress: called with a label, what is done and how much there is.

    Raises:
        UsageError: none of the data can be read.
    """
    meter, done = AccuracyMeter(labelled.classes), 0
    for read in labelled.samples.batches(batch or _BATCH):
        progress(label, done, len(labelled.samples.names))
        done = read.stop
        assert read.labels is not None, "AccuracyBudget.open refuses data without labels"
        if len(read.labels):
            meter.add(_at_batch(read.inputs, batch, lambda inputs: labelled.logits(runtime.run(inputs))), read.labels)
    accuracy = meter.accuracy()
    if accuracy is None:
        raise UsageError("none of the labelled samples can be read", expected="pictures with labels")
    return accuracy


def harm_of(
    runtime: GatedRuntime, groups: Sequence[str], labelled: Labelled, *, batch: int | None, progress: Progress
) -> dict[str, float]:
    """Return how far the logits move when one group alone is in INT8: mean square over the logits' mean square."""
    moved = dict.fromkeys(groups, 0.0)
    power, done = 0.0, 0
    for read in labelled.few.batches(batch or _BATCH):
        first, done = done, read.stop
        if not len(next(iter(read.inputs.values()))):
            continue
        exact = _at_batch(read.inputs, batch, partial(runtime.logits, groups=())).astype(np.float64)
        power += float((exact**2).sum())
        for i, group in enumerate(groups):
            progress("ranking", first * len(groups) + i, len(labelled.few.names) * len(groups))
            found = _at_batch(read.inputs, batch, partial(runtime.logits, groups=(group,)))
            moved[group] += float(((found - exact) ** 2).sum())
    return {group: value / power if power else value for group, value in moved.items()}


def _at_batch(inputs: Inputs, batch: int | None, run: Callable[[Inputs], Array]) -> Array:
    """Run some samples; where a fixed batch is larger, it is filled with copies of the last one."""
    held = len(next(iter(inputs.values())))
    if batch is None or batch == held:
        return run(inputs)
    filled = np.minimum(np.arange(batch), held - 1)
    return run({name: array[filled] for name, array in inputs.items()})[:held]


class GatedRuntime(Closing):
    """Runs a model with any of its groups in INT8: what INT8 costs, group by group, in one session.

    Before -> after::

        MatMul(x, W)  ->  MatMul(Where(gate, DQ(Q(x)), x), Where(gate, DQ(W: int8), W))      gate: bool, a graph input

    With all switches off the graph computes what it computed; with all of them on, what the INT8 graph with FP32 around
    it computes: bit for bit where ONNX Runtime optimises neither.

    Args:
        model: the FP32 graph in which the placement was found; it is used up.
        placement: the groups.
        ranges: value name -> largest magnitude.
        scale_type: scales are numbers of this type.
        number_format: what is quantised to.
        output: name of the logits.
        optimize: let ONNX Runtime rewrite the graph.
    """

    def __init__(
        self,
        model: ir.Model,
        placement: Placement,
        ranges: Mapping[str, float],
        *,
        scale_type: ir.DataType,
        number_format: NumberFormat = INT8,
        output: str,
        optimize: bool = True,
    ) -> None:
        graph = model.graph
        names = Names(value_names(graph))
        self._gates = {group: _gate(graph, names.unique(f"gate_{i}")) for i, group in enumerate(placement.groups)}
        self._output = output
        inserter = Inserter(graph, scale_type, number_format)
        for site in placement.sites:
            gate = self._gates[site.group]
            for position, value, quantized in inserter.operands(site, ranges):
                where = ir.node("Where", [gate, quantized, value])
                result = where.outputs[0]
                result.name, result.dtype, result.shape = names.unique("gated"), ir.DataType.FLOAT, value.shape
                graph.insert_before(site.node, where)
                site.node.replace_input_with(position, result)
        with temporary_folder() as folder:
            path, *_ = write_model(model, folder / "gated.onnx")
            self._runtime = OrtRuntime(path, optimize=optimize, move_qdq=not number_format.is_floating)

    def logits(self, inputs: Mapping[str, Array], groups: Collection[str]) -> Array:
        """Run one batch with these groups in INT8; return [B, classes]."""
        gates = {str(gate.name): np.array(group in groups) for group, gate in self._gates.items()}
        return self._runtime.run({**inputs, **gates})[self._output]

    def close(self) -> None:
        """Free what is held."""
        self._runtime.close()


def _gate(graph: ir.Graph, name: str) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
    graph.inputs.append(value)
    return value
