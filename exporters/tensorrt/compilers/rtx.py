"""TensorRT for RTX: it compiles ahead of time, without a GPU, for those that are named.

There is nothing to measure, so there are no timings; and two builds of the same ONNX file for the same
targets have the same bytes. The plan cannot be loaded where there is no GPU, so its layers are not asked of an
inspector: the builder lists them itself, and its targets stand in its header. With detailed profiling verbosity one
verbose message holds a line for each layer:

    Layers:
    Name: .., LayerType: gemm, Inputs: [ { Name: .., Dimensions: [-1,96], .., Datatype: Half, .. }], Constants: [..],
    Outputs: [..], TacticName: .., StreamId: 0, Metadata: [ONNX Layer: a/MatMul][ONNX Layer: ..]

What signals another stream, or waits for it, has an EventId, too. The list is meant for people: names of nodes stand
in it as they are, with their commas, brackets and line breaks. So a network gets plain names in their place before it
is built, see `PlainNames`. What cannot be read is kept as a name, which proves nothing.

Sources: TensorRT for RTX 1.7, Python API; "Ahead-of-time compilation", "Deploying to multiple GPU architectures".
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, cast

from deploycli.exporters.target.product import RTX
from deploycli.exporters.target.targets import named
from deploycli.exporters.tensorrt import library
from deploycli.exporters.tensorrt.compilers import EngineReport, network_io
from deploycli.exporters.tensorrt.parser import NO_DRIVER
from deploycli.models.errors import BuildError, EnvironmentUnsuitable

if TYPE_CHECKING:
    from collections.abc import Callable

    import tensorrt as trt

    from deploycli.exporters.bundle.engine import GpuRecord, PlanHeader
    from deploycli.exporters.tensorrt.callbacks import Log, Monitor
    from deploycli.exporters.tensorrt.job import Job

_NODE = re.compile(r"\[ONNX Layer: (.*)\]", re.DOTALL)

_MEMORY = re.compile(r"^Total (Weights|Activation) Memory: (\d+) bytes", re.IGNORECASE)


LISTING = "Layers:\n"
"""What the message begins with."""

_END = "\n\nI/O Tensors:\n"
_NEXT = re.compile(r"\n(?=Name: )")
_PLAIN = re.compile(r"[\w./+:-]*")
_STAND_IN = re.compile(r"~(\d+)~")
_LAYER = re.compile(
    r"Name: (?P<Name>.*?), LayerType: (?P<LayerType>\w*), Inputs: \[(?P<Inputs>.*?)\], "
    r"Constants: \[(?P<Constants>.*?)\], Outputs: \[(?P<Outputs>.*?)\], "
    r"TacticName: (?P<TacticName>[^,]*), StreamId: -?\d+(?:, \w+: [^,]*)*?, Metadata: (?P<Metadata>.*)",
    re.DOTALL,
)
_TENSOR = re.compile(
    r"\{ Name: (?P<Name>.*?), Dimensions: \[(?P<Dimensions>[-\d,]*)\], Strides: \[(?P<Strides>[-\d,]*)\], "
    r"StrideOrder: \[[-\d,]*\], Datatype: (?P<Datatype>\w+)",
    re.DOTALL,
)


class Rtx:
    """TensorRT for RTX, for one build; see `deploycli.exporters.tensorrt.compilers.Compiler`."""

    gpu: GpuRecord | None = None

    def __init__(self, job: Job, log: Log) -> None:
        self._job = job
        self._log = log
        self._listing = ""
        self._names = PlainNames()
        self._memory: dict[str, int] = {}
        log.dropped = NO_DRIVER
        log.listen(self._hear)

    def start(self) -> None:
        """Say what is compiled for."""
        self._log.write(f"{RTX.title} {library.version(RTX)}, for {named(self._job.targets)}")

    def configure(self, builder: trt.Builder, monitor: Monitor) -> trt.IBuilderConfig:
        """Return a configuration for the targets; what is not said there stays as NVIDIA has it.

        Raises:
            BuildError: it does not take a target.
            EnvironmentUnsuitable: this version does not know one.
        """
        import tensorrt_rtx as rtx

        config: Any = builder.create_builder_config()  # it has names that TensorRT's lacks
        if config is None:
            raise BuildError(f"{RTX.title} makes no configuration: {self._log.last()}")
        config.num_compute_capabilities = len(self._job.targets)
        for slot, (major, minor) in enumerate(self._job.targets):
            target = rtx.ComputeCapability.__members__.get(f"SM{major}{minor}")
            if target is None:
                raise EnvironmentUnsuitable(
                    f"{RTX.title} {library.version(RTX)} knows no compute capability {major}.{minor}",
                    expected=", ".join(rtx.ComputeCapability.__members__),
                    hint="pip install --upgrade tensorrt-rtx-cu12, or another --gpu",
                )
            if not config.set_compute_capability(target, slot):
                raise BuildError(f"{RTX.title} does not take compute capability {major}.{minor}: {self._log.last()}")
        config.profiling_verbosity = rtx.ProfilingVerbosity.DETAILED
        config.progress_monitor = monitor
        return cast("trt.IBuilderConfig", config)

    def adapt(self, network: trt.INetworkDefinition) -> None:
        """Let every operator Attention be taken apart where there is no kernel for all of it, as in FP32; and give
        plain names to what has others, for the list of the engine's layers is read.
        """
        import tensorrt_rtx as rtx

        outputs = {network.get_output(place).name for place in range(network.num_outputs)}
        for place in range(network.num_layers):
            layer: Any = network.get_layer(place)
            layer.name, layer.metadata = self._names.plain(layer.name), self._plain_metadata(layer.metadata)
            for tensor in map(layer.get_output, range(layer.num_outputs)):
                if tensor is not None and tensor.name not in outputs:
                    tensor.name = self._names.plain(tensor.name)
            if layer.type == rtx.LayerType.ATTENTION_OUTPUT:
                layer.__class__ = rtx.IAttentionOutputLayer  # a layer comes as its base class
                layer.attention.decomposable = True

    def read(
        self, plan: bytes, header: PlanHeader, config: trt.IBuilderConfig, network: trt.INetworkDefinition
    ) -> EngineReport:
        """Read the layers from the builder's message, and the targets from the plan.

        Raises:
            BuildError: the plan is for other targets than were asked for.
        """
        if header.targets != self._job.targets:
            found = named(header.targets) if header.targets else "no target"
            raise BuildError(f"the plan is for {found}", expected=named(self._job.targets))
        layers = as_inspector_json(self._listing, self._names) if self._listing else None
        return EngineReport(layers, network_io(network, self._job.settings), dict(self._memory))

    def keep(self) -> str:
        """Keep nothing: nothing was measured."""
        return ""

    def advice(self) -> str:
        """Say what to try where no engine was built."""
        return "deploycli lint, which names what TensorRT does not take"

    def _plain_metadata(self, metadata: str) -> str:
        found = _NODE.fullmatch(metadata)
        return metadata if found is None else f"[ONNX Layer: {self._names.plain(found[1])}]"

    def _hear(self, message: str) -> None:
        if message.startswith(LISTING):
            self._listing = message
        elif found := _MEMORY.match(message):
            self._memory[f"{found[1].lower()}_memory"] = int(found[2])


class PlainNames:
    """Names that a reader of the list cannot mistake, in place of those that it could."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def plain(self, name: str) -> str:
        """Return a name itself where it is plain, or else what stands for it."""
        if _PLAIN.fullmatch(name):
            return name
        return f"~{self._places.setdefault(name, len(self._places))}~"

    def restored(self, text: str) -> str:
        """Return a text with the names that it had."""
        names = list(self._places)
        return _STAND_IN.sub(lambda found: names[int(found[1])] if int(found[1]) < len(names) else found[0], text)


def as_inspector_json(message: str, names: PlainNames | None = None) -> str:
    """Return the layers of a message that begins with `LISTING`, as the inspector writes them.

    Args:
        message: the message.
        names: that were given to the network's layers and tensors.
    """
    text = message.removeprefix(LISTING).partition(_END)[0]
    names = PlainNames() if names is None else names
    return json.dumps({"Layers": [_layer(line, names.restored) for line in _NEXT.split(text) if line.strip()]})


def _layer(line: str, restored: Callable[[str], str]) -> dict[str, Any] | str:
    found = _LAYER.fullmatch(line)
    if found is None:
        return restored(line)
    entry: dict[str, Any] = {key: restored(text) for key, text in found.groupdict().items()}
    return {**entry, **{key: _tensors(found[key], restored) for key in ("Inputs", "Constants", "Outputs")}}


def _tensors(text: str, restored: Callable[[str], str]) -> list[dict[str, Any]]:
    return [
        {
            "Name": restored(found["Name"]),
            "Dimensions": _numbers(found["Dimensions"]),
            "Strides": _numbers(found["Strides"]),
            "Datatype": found["Datatype"],
        }
        for found in _TENSOR.finditer(text)
    ]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
