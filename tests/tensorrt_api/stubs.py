"""Type stubs for the bindings, made from their docstrings when they are needed, and mypy run against them.

The stubs lie in the cache folder beside the bindings: their signatures are NVIDIA's.

    python -m tests.tensorrt_api.stubs VERSION FILE...

type-checks product files against a version.
"""

from __future__ import annotations

import hashlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.one_package import CONFIG, as_installed, mypy
from tests.tensorrt_api import signatures as signatures_module
from tests.tensorrt_api.bindings import ROOT, environment, locked, prepare
from tests.tensorrt_api.signatures import Kind, Signature, signatures

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import ModuleType

HEADER = """\
# mypy: disable-error-code="override, overload-cannot-match"
import builtins
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, SupportsIndex, overload

import numpy
from typing_extensions import Buffer, CapsuleType, Never

__version__: str

def volume(iterable: Iterable[builtins.int]) -> builtins.int: ...
def nptype(trt_type: DataType) -> builtins.type[numpy.generic]: ...
"""
# What makes an object answers with None where it fails; so do these getters.
FACTORIES = re.compile(r"(create|build|deserialize|serialize|add)(_|$)|get_timing_cache|load_runtime")
ABSENT = {("ILayer", "get_input"), ("ILayer", "get_output")}
# Properties that hold an object of the user's hold None before; these never do.
ALWAYS = {"engine", "logger", "builder", "attention", "loop"}
# Special methods that a stub repeats as they are.
SPECIAL = {"__init__", "__len__", "__getitem__", "__setitem__", "__delitem__", "__contains__", "__iter__", "__bool__"}
ENUM = """\
__members__: ClassVar[builtins.dict[builtins.str, {name}]]
@builtins.property
def name(self) -> builtins.str: ...
@builtins.property
def value(self) -> builtins.int: ...
def __init__(self, value: SupportsIndex) -> None: ...
def __int__(self) -> builtins.int: ...
def __index__(self) -> builtins.int: ...
def __hash__(self) -> builtins.int: ...
def __eq__(self, other: object) -> builtins.bool: ...
"""
BUFFER = "def __buffer__(self, flags: builtins.int, /) -> builtins.memoryview: ..."


def classes_of(module: ModuleType) -> dict[str, type]:
    """Every class of the compiled module by its qualified name."""
    found: dict[str, type] = {}

    def collect(holder: object, prefix: str) -> None:
        for value in list(vars(holder).values()):
            if isinstance(value, type) and value.__module__ == module.__name__:
                name = value.__qualname__
                if name not in found and name.rpartition(".")[0] == prefix:
                    found[name] = value
                    collect(value, name)

    collect(module, "")
    return found


def function_of(member: object) -> Any | None:
    """The compiled function behind a class's member, if it is one."""
    function = getattr(member, "__func__", member)
    return function if type(function).__name__ in ("builtin_function_or_method", "instancemethod") else None


class Generator:
    """Writes the stub of one module.

    Args:
        module: the compiled one, ``tensorrt.tensorrt``.
    """

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.classes = classes_of(module)

    def text(self) -> str:
        """The whole stub."""
        lines = [HEADER]
        for name, value in vars(self.module).items():
            if type(value) in self.classes.values():
                lines.append(f"{name}: {type(value).__qualname__}")
            elif isinstance(value, type) and value.__qualname__ in self.classes:
                lines += self.of_class(value) if value.__name__ == name else [f"{name} = {value.__qualname__}"]
            elif function_of(value):
                lines += self.of_function("", name, value)
        return "\n".join(lines) + "\n"

    def of_class(self, cls: type) -> Iterator[str]:
        """The lines of a class and of those in it."""
        bases = [base.__qualname__ for base in cls.__bases__ if base.__qualname__ in self.classes]
        yield f"class {cls.__name__}({', '.join(bases)}):" if bases else f"class {cls.__name__}:"
        yield from ("    " + line for line in self.body(cls))
        yield "    ..."

    def body(self, cls: type) -> Iterator[str]:
        """The lines in a class."""
        members = vars(cls)
        enum = "__members__" in members
        if enum:
            yield from ENUM.format(name=cls.__qualname__).splitlines()
        elif not function_of(members.get("__init__")):
            yield "def __init__(self, no_constructor: Never, /) -> None: ..."
        if cls.__name__ == "IHostMemory":
            yield BUFFER
        for name, value in members.items():
            if name not in ("name", "value") and name[0] != "_" if enum else name[0] != "_" or name in SPECIAL:
                yield from self.of_member(cls.__qualname__, name, value)
        if "__getitem__" in members and "__iter__" not in members:
            items = self.overloads("__getitem__", function_of(members["__getitem__"]))
            of = [o.returns.annotation(parameter=False) for o in items if o.parameters[-1].kind.name == "int"]
            yield f"def __iter__(self) -> Iterator[{of[0] if of else 'Any'}]: ..."

    def of_member(self, cls: str, name: str, value: Any) -> Iterator[str]:
        """The lines of a class's member."""
        if type(value).__name__ == "pybind11_static_property":
            (getter,) = self.overloads("", value.fget)
            yield f"{name}: ClassVar[{getter.returns.annotation(parameter=False)}]"
        elif isinstance(value, property):
            yield from self.of_property(name, value)
        elif function_of(value):
            yield from self.of_function(cls, name, value)
        elif isinstance(value, type):
            yield from (
                self.of_class(value) if value.__qualname__ == f"{cls}.{name}" else [f"{name} = {value.__qualname__}"]
            )
        elif type(value).__qualname__ in self.classes:
            yield f"{name}: ClassVar[{type(value).__qualname__}]"
        elif not callable(value):
            yield f"{name}: ClassVar[Any]"

    def of_property(self, name: str, member: property) -> Iterator[str]:
        """The lines of a property: its getter's docstring has a signature without a name."""
        (getter,) = self.overloads("", member.fget) or [Signature((), Kind("any"))]
        kind = getter.returns
        none = " | None" if self.is_handle(kind) and name not in ALWAYS else ""
        yield "@builtins.property"
        yield f"def {name}(self) -> {kind.annotation(parameter=False)}{none}: ..."
        if member.fset:
            setters = self.overloads("", member.fset)
            value = setters[0].parameters[-1].kind if setters else Kind("any")
            none = " | None" if self.is_handle(value) else ""
            yield f"@{name}.setter"
            yield f"def {name}(self, value: {value.annotation(parameter=True)}{none}) -> None: ..."

    def of_function(self, cls: str, name: str, value: object) -> Iterator[str]:
        """The lines of a function or method, one ``def`` for each overload."""
        static = isinstance(value, staticmethod)
        receiver = ["self"] if cls and not static else []
        overloads = self.overloads(name, function_of(value))
        written = list(dict.fromkeys(self.signature(cls, name, overload, receiver) for overload in overloads))
        for text in written or [f"({', '.join([*receiver, '*args: Any', '**kwargs: Any'])}) -> Any"]:
            if static:
                yield "@builtins.staticmethod"
            if len(written) > 1:
                yield "@overload"
            yield f"def {name}{text}: ..."

    def overloads(self, name: str, function: Any) -> list[Signature]:
        """A function's overloads."""
        return signatures(name, getattr(function, "__doc__", None), self.classes)

    def signature(self, cls: str, name: str, overload: Signature, receiver: list[str]) -> str:
        """From the opening parenthesis to the result."""
        overload = overload.bound() if receiver else overload
        written, optional = list(receiver), False
        for place, parameter in enumerate(overload.parameters, 1):
            kind = parameter.kind
            if parameter.name == "logger" and kind.name == "capsule":
                kind = Kind("ILogger")
            optional = optional or parameter.optional
            none = " | None" if parameter.default == "None" else ""
            default = " = ..." if optional else ""
            label = f"{parameter.name}_" if parameter.unnamed else parameter.name
            written.append(f"{label}: {kind.annotation(parameter=not self.is_callback(cls))}{none}{default}")
            if place == overload.positional:
                written.append("/")
        return f"({', '.join(written)}) -> {self.result(cls, name, overload.returns)}"

    def result(self, cls: str, name: str, kind: Kind) -> str:
        """What a call gives."""
        fails = FACTORIES.match(name) or (cls, name) in ABSENT
        return kind.annotation(parameter=False) + (" | None" if fails and self.is_handle(kind) else "")

    def is_callback(self, cls: str) -> bool:
        """Whether TensorRT calls the methods of a class, which the user derives: they get what it says, exactly."""
        return cls.startswith("I") and function_of(vars(self.classes[cls]).get("__init__")) is not None

    def is_handle(self, kind: Kind) -> bool:
        """Whether a type is held by a pointer, which may be null: no enum, no value that Python can make."""
        cls = self.classes.get(kind.name)
        if cls is None or kind.name in signatures_module.CONVERTED:
            return False
        return "__members__" not in vars(cls)


def stub_folder(version: str) -> Path:
    """A folder for ``MYPYPATH``; its stub is made if it is not there yet."""
    sources = "".join(inspect.getsource(module) for module in (sys.modules[__name__], signatures_module))
    folder = prepare(version) / f"stubs-{hashlib.sha256(sources.encode()).hexdigest()[:8]}"
    stub = folder / "tensorrt/__init__.pyi"
    with locked("stubs"):
        if not stub.exists():
            command = [sys.executable, "-m", __spec__.name, "--emit"]
            result = subprocess.run(command, env=environment(version), capture_output=True, text=True, check=False)
            if result.returncode:
                raise RuntimeError(result.stderr)
            stub.parent.mkdir(parents=True, exist_ok=True)
            stub.with_suffix(".new").write_text(result.stdout)
            stub.with_suffix(".new").rename(stub)
    return folder


def rtx_stubs(folder: Path) -> Path:
    """Write the stub of TensorRT for RTX as it is installed, by both names that our code has for it.

    Args:
        folder: for ``MYPYPATH``; returned.
    """
    from tensorrt_rtx_bindings import tensorrt_rtx

    for name, text in (
        ("tensorrt_rtx", Generator(tensorrt_rtx).text()),
        ("tensorrt", "from tensorrt_rtx import *\n__version__: str\n"),
    ):
        (folder / name).mkdir()
        (folder / name / "__init__.pyi").write_text(text)
    return folder


def copied(file: Path) -> bool:
    """Whether a file is neither of the product nor a stub: mypy reads a copy, for its cache goes by paths."""
    return not file.is_relative_to(ROOT) and file.suffix != ".pyi"


def _place(file: Path) -> str:
    """Return where mypy reads a file, seen from the folder that holds the package."""
    if copied(file):
        return file.name
    return str(as_installed(file)) if file.is_relative_to(ROOT) else str(file)


def check(stubs: str | Path, files: Sequence[Path]) -> list[str]:
    """Run mypy on product files against stubs.

    Args:
        stubs: one of `bindings.VERSIONS`, or a folder for ``MYPYPATH``.
        files: what is checked; what they import is read, but not judged. It is read as for the mypy of the whole
            package, so that one cache serves both.

    Returns:
        mypy's lines about these files: ``path:line: error: ... [code]``. What else is not installed is not among them.
    """
    if not files:
        return []
    folder = stub_folder(stubs) if isinstance(stubs, str) else stubs
    shown = {_place(file): file for file in files}
    options = ["--strict", "--no-error-summary", "--no-color-output", "--hide-error-context", "--no-pretty"]
    with locked("mypy") as kept:
        result = mypy(
            *options,
            "--show-error-codes",
            *shown,
            cache=kept / "mypy",
            config=CONFIG,
            stubs=folder,
            beside=[file for file in files if copied(file)],
        )
    if result.returncode not in (0, 1):
        raise RuntimeError(result.stdout + result.stderr)
    lines = [line.partition(":") for line in result.stdout.splitlines() if ": error: " in line]
    errors = [f"{shown[place] if copied(shown[place]) else place}:{rest}" for place, _, rest in lines if place in shown]
    return [line for line in errors if not re.search(r"\[import-(not-found|untyped)\]$", line) or '"tensorrt' in line]


def main(arguments: Sequence[str]) -> int:
    """Check files, or write this process's stub to stdout."""
    if list(arguments) == ["--emit"]:
        import tensorrt.tensorrt

        print(Generator(tensorrt.tensorrt).text())
        return 0
    errors = check(arguments[0], [Path(name) for name in arguments[1:]])
    print(*errors, sep="\n")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
