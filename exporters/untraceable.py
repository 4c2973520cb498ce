"""Say what a model could not be traced at: the module, the operator, the line of its own code."""

from __future__ import annotations

import contextlib
import re
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from deploycli.models.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from torch.export import ExportedProgram

_TORCH = Path(torch.__file__).parent
_OPERATOR = re.compile(r"op='([\w.]+)'|target: ([\w.]+)|\b(aten[.:]+[\w.]+)")


class ModuleTracker:
    """Knows which module of a model is running, and after an exception, in which one it was raised."""

    def __init__(self, root: nn.Module) -> None:
        self._names = {id(module): name for name, module in root.named_modules()}
        self._running: list[nn.Module] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the calls of all modules."""
        hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, _arguments: object) -> None:
        if id(module) in self._names:
            self._running.append(module)

    def _leave(self, module: nn.Module, _arguments: object, _result: object) -> None:
        if self._running and self._running[-1] is module:
            self._running.pop()

    @property
    def where(self) -> str:
        """The innermost running module, as ``layers.0.attn (WindowAttention)``; empty where none runs."""
        if not self._running:
            return ""
        module = self._running[-1]
        return f"{self._names[id(module)] or 'the model itself'} ({type(module).__name__})"


def explain(error: Exception, tracker: ModuleTracker, program: ExportedProgram | None, prefix: str) -> ExportError:
    """Turn what a tracer raised into one message.

    Args:
        error: the exception.
        tracker: followed the trace.
        program: what was traced, where tracing itself succeeded and the translation to ONNX failed.
        prefix: what the paths of the program's modules begin with.
    """
    text = _text(error)
    operator = next((next(filter(None, match.groups())) for match in _OPERATOR.finditer(text)), "")
    operator = operator.removesuffix(".default")
    if not operator and "data-dependent" in text:
        operator = "aten.item"  # what bool(), int() and .item() of a tensor are
    if program is not None:
        where = _module_of(operator, program).removeprefix(prefix)
        return ExportError(
            f"operator {operator or 'unknown'} has no translation to ONNX"
            + (f", in module {where}" if where else f": {_gist(text)}"),
            expected="operators of PyTorch's ONNX exporter",
            hint="another opset, or another formulation of that module",
        )
    line = _users_line(error)
    where = tracker.where
    return ExportError(
        f"the model cannot be traced: {_gist(text)}"
        + (f"; in module {where}" if where else "")
        + (f", operator {operator}" if operator else "")
        + (f", at {line}" if line else ""),
        expected="a forward pass without control flow that depends on data, or on the batch size",
        hint="--batch N, if the model only works at one batch size",
    )


def _text(error: BaseException) -> str:
    """All messages of a chain of exceptions, the first cause first: it names the operator."""
    texts: list[str] = []
    seen: BaseException | None = error
    while seen is not None:
        texts.insert(0, str(seen))
        seen = seen.__cause__
    return "\n".join(texts)


def _gist(text: str) -> str:
    """The first line, and the one that says why a symbolic axis became a number."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip(" -") for line in text.splitlines()]
    told = [line for line in lines if line]
    why = next((line for line in told[1:] if "specialized" in line or "satisfy the generated guard" in line), "")
    return " ".join(filter(None, (told[0] if told else "no reason given", why)))[:500]


def _module_of(operator: str, program: ExportedProgram) -> str:
    # A decomposition calls aten._linalg_svd what the program calls aten.linalg_svd.
    wanted = operator.replace("::", ".").rpartition(".")[2].strip("_")
    for node in program.graph.nodes:
        if node.op == "call_function" and wanted and wanted in str(node.target):
            stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
            if stack:
                path, kind = list(stack.values())[-1]
                name = kind if isinstance(kind, str) else kind.__name__
                return f"{path or 'the model itself'} ({name.rpartition('.')[2]})"
    return ""


def _users_line(error: BaseException) -> str:
    """The last line outside of PyTorch that ran: the user's own code."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not Path(frame.filename).is_relative_to(_TORCH) and "exporters" not in Path(frame.filename).parts
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno} `{frames[-1].line}`" if frames else ""
