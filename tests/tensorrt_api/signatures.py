"""Signatures as pybind11 writes them in docstrings: read, and written as annotations.

Only strings and classes come in, so that nothing here needs TensorRT.
"""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Iterable
from dataclasses import dataclass

# How pybind11 2 and 3 call them -> one name
SPELLINGS = {
    "int": ("SupportsInt", "SupportsIndex"),
    "float": ("SupportsFloat",),
    "list": ("List", "Sequence"),
    "tuple": ("Tuple",),
    "dict": ("Dict", "Mapping"),
    "buffer": ("Buffer",),
    "capsule": ("CapsuleType",),
    "callable": ("Callable", "function"),
    "iterator": ("Iterator",),
    "iterable": ("Iterable",),
    "any": ("object", "handle", "Any"),
}
BASIC = {spelling: name for name, spellings in SPELLINGS.items() for spelling in (name, *spellings)}
BASIC |= {name: name for name in ("str", "bool", "bytes", "None", "ndarray", "memoryview", "slice")}

# Names of the C++ interfaces whose Python classes are called otherwise.
CPP = {"IBuilder": "Builder", "IRuntime": "Runtime", "IRefitter": "Refitter", "IParserError": "ParserError"}

# What pybind11 converts into these classes by itself.
CONVERTED = {
    **dict.fromkeys(("Dims", "Dims2", "DimsHW", "Dims3", "Dims4", "Permutation"), "Sequence[SupportsIndex]"),
    "Weights": "numpy.ndarray[Any, Any]",
}


@dataclass(frozen=True)
class Kind:
    """A type: a value of `BASIC`, or the name of one of the module's classes."""

    name: str
    arguments: tuple[Kind, ...] = ()

    def annotation(self, *, parameter: bool) -> str:
        """As a stub says it."""
        inner = [argument.annotation(parameter=parameter) for argument in self.arguments]
        first = inner[0] if inner else "Any"
        written = {
            "int": "SupportsIndex" if parameter else "builtins.int",
            "list": f"Sequence[{first}]" if parameter and inner else f"builtins.list[{first}]",
            "tuple": f"builtins.tuple[{', '.join(inner) or 'Any, ...'}]",
            "dict": f"builtins.dict[{', '.join(inner) or 'Any, Any'}]",
            "buffer": "Buffer",
            "capsule": "CapsuleType",
            "callable": "Callable[..., Any]",
            "iterator": f"Iterator[{first}]",
            "iterable": f"Iterable[{first}]",
            "any": "Any",
            "None": "None",
            "ndarray": "numpy.ndarray[Any, Any]",
        }
        if self.name in written:
            return written[self.name]
        if self.name in BASIC:
            return f"builtins.{self.name}"
        return f"{self.name} | {CONVERTED[self.name]}" if parameter and self.name in CONVERTED else self.name


@dataclass(frozen=True)
class Parameter:
    """One parameter; without a name it can be given by position only."""

    name: str
    kind: Kind
    default: str | None = None

    @property
    def unnamed(self) -> bool:
        return bool(re.fullmatch(r"arg\d+", self.name)) or keyword.iskeyword(self.name)

    @property
    def optional(self) -> bool:
        return self.default is not None


@dataclass(frozen=True)
class Signature:
    """One overload."""

    parameters: tuple[Parameter, ...]
    returns: Kind

    @property
    def positional(self) -> int:
        """How many parameters come by position only."""
        return max((place for place, parameter in enumerate(self.parameters, 1) if parameter.unnamed), default=0)

    def bound(self) -> Signature:
        """Without the first parameter, the object."""
        return Signature(self.parameters[1:], self.returns)


def signatures(name: str, doc: str | None, classes: Iterable[str]) -> list[Signature]:
    """All overloads that a docstring names, ``self`` included; none if it names none that can be read."""
    known = frozenset(classes)
    pattern = rf"(?:\d+\. )?{re.escape(name)}\((.*)\)(?: -> (.*))?"
    lines = (doc or "").splitlines()
    candidates = lines if "Overloaded function." in lines else lines[:1]
    found = [match for match in (re.fullmatch(pattern, line) for line in candidates) if match]
    return [_signature(match[1], match[2], known) for match in found if match[1] != "*args, **kwargs"]


def _signature(text: str, returns: str | None, known: frozenset[str]) -> Signature:
    parameters: list[Parameter] = []
    for part in _split(text, ","):
        if part.strip() == "/":
            parameters = [Parameter(f"arg{n}", p.kind, p.default) for n, p in enumerate(parameters)]
            continue
        name, _, rest = part.strip().partition(": ")
        kind, *default = _split(rest, "=")
        parameters.append(Parameter(name, parse(kind, known), default[0].strip() if default else None))
    return Signature(tuple(parameters), parse(returns or "None", known))


def _split(text: str, separator: str) -> list[str]:
    """Split where no bracket is open."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{<") - (character in ")]}>")
        if character == separator and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts if text.strip() else []


def parse(text: str, known: frozenset[str]) -> Kind:
    """Read a type; what cannot be read is anything."""
    python = text.strip().replace("tensorrt.tensorrt.", "").replace("::", ".")
    try:
        return _kind(ast.parse(python, mode="eval").body, known)
    except (SyntaxError, KeyError):
        return Kind("any")


def _kind(node: ast.expr, known: frozenset[str]) -> Kind:
    if isinstance(node, ast.Subscript):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return Kind(_kind(node.value, known).name, tuple(_kind(part, known) for part in inner))
    full = ast.unparse(node)
    last = full.rpartition(".")[2]
    for name in (full, last, CPP.get(last, last)):
        if name in known:
            return Kind(name)
    return Kind(BASIC[last])
