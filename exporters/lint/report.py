"""What a rule says, and what a lint found: problems, findings, attention blocks, and the verdict over all of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from deploycli.exporters.graph.shapes import BATCH
from deploycli.exporters.graph.unique import label

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploycli.exporters.graph.shapes import Dims
    from deploycli.exporters.target.verdict import Verdict

Level = Literal["error", "warning"]


# --- what a rule says, which does not know its number ---


@dataclass(frozen=True)
class Problem:
    """One place where a rule is broken; see :class:`Finding`."""

    level: Level
    where: str
    message: str
    hint: str
    silent: bool = False


def error(where: ir.Node | str, message: str, hint: str = "") -> Problem:
    """Return a problem with which the parser or the builder refuses the graph."""
    return Problem("error", name_of(where), message, hint)


def differs(where: ir.Node | str, message: str, hint: str = "") -> Problem:
    """Return an error with which there is an engine all the same: it gives a tensor another type or other values than
    ONNX does, in silence.
    """
    return Problem("error", name_of(where), message, hint, silent=True)


def warning(where: ir.Node | str, message: str, hint: str = "") -> Problem:
    """Return a problem that costs speed or accuracy."""
    return Problem("warning", name_of(where), message, hint)


def name_of(where: ir.Node | str) -> str:
    """Return what to call a node, a tensor or a graph."""
    return where if isinstance(where, str) else label(where) or "a node without name and operator"


def type_name(dtype: ir.DataType | None) -> str:
    """Return what to call an element type."""
    return "an unknown type" if dtype is None else dtype.name


def shape_text(dims: Dims) -> str:
    """Return what to call a shape."""
    return str([f"{d // BATCH}*batch" if d and d % BATCH == 0 else d for d in dims])


# --- what a lint found ---


@dataclass(frozen=True)
class Finding:
    """One place where a graph breaks a rule.

    Attributes:
        rule: name of the rule, such as ``strong-typing``.
        level: ``error`` where the parser or the builder refuses the graph or gives a tensor the wrong type,
            ``warning`` where the engine is slower or less exact than it could be.
        node: name of the node, which carries the PyTorch module path; of the tensor, where the finding is about one;
            of the graph, where it is about all of it.
        message: what was found.
        hint: what to do.
        silent: an error with which there is an engine all the same, that computes something else than ONNX.
        number: what the rule was called before rules had names; kept for one release.
    """

    rule: str
    level: Level
    node: str
    message: str
    hint: str = ""
    silent: bool = False
    number: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class AttentionBlock:
    """One attention, and whether the compiler makes one kernel of it.

    Attributes:
        node: name of its Softmax, or of its Attention operator.
        precision: element type of what the first MatMul multiplies: ``fp32``, ``fp16``, ``bf16``, ``int8``, ``fp8``;
            empty where it is not known.
        head_dim: channels of one head; None where it is not known or not constant.
        tokens: queries and keys of one window or image, where both are known.
        constant_bytes: bytes of the constants that are added to its scores.
        reasons: why it does not, most structural first; empty where it does.
    """

    node: str
    precision: str
    head_dim: int | None
    tokens: tuple[int, int] | None
    constant_bytes: int
    reasons: tuple[str, ...] = ()

    @property
    def fusable(self) -> bool:
        """Whether the compiler makes one kernel of it, as far as it was seen to."""
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        """Return the block as JSON values."""
        tokens = None if self.tokens is None else list(self.tokens)
        return {**asdict(self), "tokens": tokens, "reasons": list(self.reasons), "fusable": self.fusable}


@dataclass(frozen=True)
class LintReport:
    """The verdict on one graph.

    Attributes:
        model: the file, or the name of a graph in memory.
        tensorrt: the TensorRT version that it was judged for.
        rules: names of the rules that were applied, in order.
        findings: rule by rule, then in the order of the graph.
        attention: every attention block, in the order of the graph; empty without attention-form.
        features: what the graph has and not every GPU computes, of `deploycli.exporters.target.targets.NEEDS`.
        quantized_share: of its matrix products and convolutions, how many read quantized operands, 0 to 1.
        parser: what NVIDIA's own parser says of the graph; None where it was not asked.
    """

    model: str
    tensorrt: str
    rules: tuple[str, ...]
    findings: tuple[Finding, ...]
    attention: tuple[AttentionBlock, ...]
    features: tuple[str, ...] = ()
    quantized_share: float = 0.0
    parser: Verdict | None = None

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings with which no engine can be built, or not the one that was meant."""
        return tuple(f for f in self.findings if f.level == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The other findings."""
        return tuple(f for f in self.findings if f.level == "warning")

    @property
    def refused(self) -> bool:
        """Whether NVIDIA's parser was asked and refuses the graph."""
        return self.parser is not None and bool(self.parser.refusals)

    @property
    def passed(self) -> bool:
        """Whether rules were applied and none found an error, nor did NVIDIA's parser."""
        return bool(self.rules) and not self.errors and not self.refused

    @property
    def disagreement(self) -> str:
        """How the rules and NVIDIA's parser differ, in a sentence; empty where they do not, or it gives no verdict.

        It is to take a graph whose errors are silent.
        """
        if self.parser is not None and self.parser.refusals and not self.errors:
            return f"the rules find no error, and the parser refuses {self.parser.refusals[0]}"
        loud = sorted({finding.rule for finding in self.errors if not finding.silent})
        if loud and self.parser is not None and self.parser.is_taken:
            rules = ", ".join(loud)
            return (
                f"rule {rules} finds errors for TensorRT {self.tensorrt}, and the parser takes the graph: another "
                "version, or the builder, may refuse it"
            )
        return ""

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "model": self.model,
            "tensorrt": self.tensorrt,
            "rules": list(self.rules),
            "passed": self.passed,
            "findings": [f.to_json() for f in self.findings],
            "attention": [block.to_json() for block in self.attention],
            "parser": None if self.parser is None else self.parser.to_json(),
            "disagreement": self.disagreement,
        }
