"""Stand-ins for TensorRT's objects, in a process that has the real bindings.

A double has the names of its real class and no others, and its methods take what the real ones take: both are read from
the bindings. Enums, `Dims`, `Weights`, loggers and whatever else works without the libraries stay real.

    recorder = install(Scenario(answers={"Builder.build_serialized_network": None}))
    ...                     # the code under test imports tensorrt as ever
    recorder.of("IBuilderConfig.set_flag")
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.tensorrt_api.signatures import CONVERTED, Kind, Signature, signatures
from tests.tensorrt_api.stubs import classes_of, function_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Fake = Callable[[Any, Mapping[str, Any]], Any]  # the double, and the arguments by name

CONSTRUCTED = ("Builder", "OnnxParser", "Runtime", "Refitter", "OnnxParserRefitter")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """An input or output of the network and of the engine.

    Args:
        name: its name.
        shape: -1 where it is dynamic.
        dtype: name in ``tensorrt.DataType``.
        output: whether it is an output.
        profile: smallest, best and largest shape of each optimization profile.
    """

    name: str
    shape: Shape
    dtype: str = "FLOAT"
    output: bool = False
    profile: Sequence[tuple[Shape, Shape, Shape]] = ()


IMAGES = Tensor("images", (-1, 3, 224, 224), profile=[((1, 3, 224, 224), (8, 3, 224, 224), (16, 3, 224, 224))])
LOGITS = Tensor("logits", (-1, 1000), output=True)


@dataclass
class Scenario:
    """What the doubles answer.

    Args:
        tensors: inputs and outputs.
        parser_errors: what the parser reports; with any, it refuses the model. Each maps a method of ``ParserError`` to
            its result: ``{"desc": "...", "node_name": "..."}``.
        plan: bytes of every engine.
        timings: bytes of every timing cache; None for those that it was made from.
        layers: what the engine inspector says, as text.
        answers: "Class.member" -> what a method returns or an attribute is; it overrides everything else. An exception
            is raised; a function is called with the double and the arguments by name.
    """

    tensors: Sequence[Tensor] = (IMAGES, LOGITS)
    parser_errors: Sequence[Mapping[str, object]] = ()
    plan: bytes = b"a plan"
    timings: bytes | None = None
    layers: str = '{"Layers": []}'
    answers: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One thing that was done to a double: "Class.method" called, "Class" made, "Class.attribute" set."""

    target: str
    arguments: dict[str, Any]
    result: Any = None

    def plain(self) -> list[Any]:
        """For JSON: enum members by name, shapes as lists, bytes by size, doubles by class."""
        return [self.target, {name: plain(value) for name, value in self.arguments.items()}, plain(self.result)]


@dataclass
class Recorder:
    """Everything that was done to the doubles, in order; a value that was only read is not among it."""

    calls: list[Call] = field(default_factory=list)

    def of(self, target: str) -> list[Call]:
        """Those of one target."""
        return [call for call in self.calls if call.target == target]

    def plain(self, *targets: str) -> list[list[Any]]:
        """For JSON: those of some targets, or all."""
        return [call.plain() for call in self.calls if not targets or call.target in targets]


def plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, HostMemory | bytes | bytearray | memoryview):
        return {"bytes": memoryview(value).nbytes}
    if type(value).__name__ in CONVERTED and hasattr(value, "__len__"):
        return list(value)
    return value.name if "__members__" in vars(type(value)) else value.__class__.__qualname__


def install(scenario: Scenario | None = None) -> Recorder:
    """Put doubles in the place of the classes that need the libraries, for the rest of this process."""
    import tensorrt

    from tests.tensorrt_api.behaviour import BEHAVIOUR

    stage = Stage(tensorrt.tensorrt, scenario or Scenario(), BEHAVIOUR)
    for name in CONSTRUCTED:
        setattr(tensorrt, name, Constructor(stage, stage.classes[name]))
    tensorrt.init_libnvinfer_plugins = stage.plugins
    return stage.recorder


class Stage:
    """What the doubles of one process share."""

    def __init__(self, module: Any, scenario: Scenario, behaviour: Mapping[str, Fake]) -> None:
        self.scenario, self.behaviour = scenario, behaviour
        self.recorder = Recorder()
        self.classes = classes_of(module)
        for target in scenario.answers:
            cls, _, member = target.rpartition(".")
            holder: object = self.classes.get(cls) if cls else module
            if not hasattr(holder, member):
                raise AttributeError(f"the scenario answers for {target}, which this version does not have")

    def record(self, target: str, arguments: dict[str, Any], result: Any = None) -> Any:
        self.recorder.calls.append(Call(target, arguments, result))
        return result

    def plugins(self, logger: object, namespace: str) -> bool:
        """Stand in for ``init_libnvinfer_plugins``."""
        arguments = {"logger": logger, "namespace": namespace}
        return bool(
            self.record(
                "init_libnvinfer_plugins", arguments, self.answer("init_libnvinfer_plugins", None, arguments, True)
            )
        )

    def overloads(self, name: str, function: Any, *, bound: bool = False) -> list[Signature]:
        found = signatures(name, getattr(function, "__doc__", None), self.classes)
        return [overload.bound() for overload in found] if bound else found

    def bind(self, target: str, overloads: Iterable[Signature], values: Any, named: Any) -> dict[str, Any]:
        """Arguments by name.

        Raises:
            TypeError: no overload takes them.
        """
        reasons = []
        for overload in overloads:
            bound = overload.bind(values, named, self.classes)
            if not isinstance(bound, str):
                return bound
            reasons.append(bound)
        if reasons:
            raise TypeError(f"{target}(): incompatible function arguments: {'; '.join(reasons)}")
        return {**{f"arg{place}": value for place, value in enumerate(values)}, **named}

    def answer(self, target: str, double: object, arguments: dict[str, Any], otherwise: Any) -> Any:
        """What the scenario says, else ``otherwise``, which is called if it is a function."""
        found = self.scenario.answers.get(target, otherwise)
        if isinstance(found, BaseException):
            raise found
        if callable(found) and not isinstance(found, type):
            return found(double, arguments)
        return found

    def value(self, kind: Kind, *, method: bool) -> Any:
        """What a call gives, or an attribute is, if nobody says it."""
        simple = {"bool": method, "int": 0, "float": 0.0, "str": "", "bytes": b"", "list": [], "tuple": (), "dict": {}}
        cls = self.classes.get(kind.name)
        if cls is None:
            return simple.get(kind.name)
        if "__members__" in vars(cls):
            return min(cls.__members__.values(), key=int)  # type: ignore[attr-defined]
        if kind.name in CONVERTED:
            return cls()
        if kind.name == "IHostMemory":
            return HostMemory(self.scenario.plan)
        return self.make(kind.name) if method else None

    def make(self, cls: str, /, **state: Any) -> Double:
        """A double of a class, with the values of some attributes."""
        return _double_type(self.classes[cls])(self, self.classes[cls], state)

    def dims(self, shape: Iterable[int]) -> Any:
        return self.classes["Dims"](list(shape))

    def tensor(self, name: str) -> Tensor | None:
        return next((tensor for tensor in self.scenario.tensors if tensor.name == name), None)


class Constructor:
    """Stands in the module for a class; knows its instances, and has its attributes."""

    def __init__(self, stage: Stage, cls: type) -> None:
        self._stage, self._real = stage, cls

    def __call__(self, *values: Any, **named: Any) -> Any:
        stage, name = self._stage, self._real.__name__
        overloads = stage.overloads("__init__", function_of(vars(self._real)["__init__"]), bound=True)
        arguments = stage.bind(name, overloads, values, named)
        made = stage.answer(f"{name}.__init__", None, arguments, None) or stage.make(name, **arguments)
        return stage.record(name, arguments, made)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class Double:
    """An object that looks like one of a real class.

    Args:
        stage: what all doubles share.
        cls: the real class.
        state: values of attributes, and whatever the behaviour keeps.
    """

    def __init__(self, stage: Stage, cls: type, state: dict[str, Any]) -> None:
        object.__setattr__(self, "_stage", stage)
        object.__setattr__(self, "_real", cls)
        object.__setattr__(self, "state", state)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # so that isinstance says what it says for a real one
        return self._real

    def __getattr__(self, name: str) -> Any:
        stage: Stage = self._stage
        member = _member(self._real, name)
        target = f"{self._real.__qualname__}.{name}"
        fake = stage.behaviour.get(target)
        if isinstance(member, property):
            if target not in stage.scenario.answers and name in self.state:
                return self.state[name]
            kinds = [overload.returns for overload in stage.overloads("", member.fget)]
            return stage.answer(target, self, {}, fake or stage.value(kinds[0] if kinds else Kind("any"), method=False))
        function = function_of(member)
        if function is None:
            return getattr(self._real, name)
        overloads = stage.overloads(name, function, bound=not isinstance(member, staticmethod))

        def method(*values: Any, **named: Any) -> Any:
            arguments = stage.bind(target, overloads, values, named)
            kind = overloads[0].returns if overloads else Kind("any")
            result = stage.answer(target, self, arguments, fake or (lambda *_: stage.value(kind, method=True)))
            return stage.record(target, arguments, result)

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        member = _member(self._real, name)
        target = f"{self._real.__qualname__}.{name}"
        if not isinstance(member, property) or member.fset is None:
            raise AttributeError(f"{target} cannot be set")
        if value is not None:
            self._stage.bind(target, self._stage.overloads("", member.fset, bound=True), (value,), {})
        self.state[name] = value
        self._stage.record(target, {"value": value})


class HostMemory(bytes):
    """`IHostMemory`: a buffer, which only C can make before Python 3.12, without what else bytes can do."""

    def __getattribute__(self, name: str) -> Any:
        import tensorrt

        if name == "nbytes":
            return bytes.__len__(self)
        if name == "dtype":
            return tensorrt.DataType.INT8
        if name == "__class__":
            return tensorrt.IHostMemory
        if not name.startswith("__"):
            raise AttributeError(f"IHostMemory has no attribute {name!r}")
        return super().__getattribute__(name)

    def _refuse(self, *_: object) -> Any:
        raise TypeError("IHostMemory is a buffer only: bytes(memory)")

    __len__ = __iter__ = __getitem__ = __contains__ = __add__ = __mul__ = _refuse


def _member(cls: type, name: str) -> Any:
    for base in cls.__mro__[:-1]:
        if name in vars(base):
            return vars(base)[name]
    raise AttributeError(f"{cls.__qualname__!r} object has no attribute {name!r}")


def _double_type(cls: type) -> type[Double]:
    """`Double` with those special methods that Python looks up on a type."""
    names = [
        name for name in ("__len__", "__getitem__", "__bool__", "__iter__") if function_of(getattr(cls, name, None))
    ]

    def forward(name: str) -> Callable[..., Any]:
        return lambda self, *values: Double.__getattr__(self, name)(*values)

    return type(f"{cls.__name__}Double", (Double,), {name: forward(name) for name in names})
