"""TensorRT for RTX: it compiles ahead of time, without a GPU, for those that are named.

There is nothing to measure, so there are no timings; and two builds of the same ONNX file for the same
targets have the same bytes. The plan cannot be loaded where there is no GPU, so its layers are not asked of an
inspector: the builder lists them itself, in one verbose message, and its targets stand in its header.

Sources: TensorRT for RTX 1.7, Python API; "Ahead-of-time compilation", "Deploying to multiple GPU architectures".
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

from deploycli.exporters.target.product import RTX
from deploycli.exporters.target.targets import named
from deploycli.exporters.tensorrt import library
from deploycli.exporters.tensorrt.listing import LISTING, PlainNames, as_inspector_json
from deploycli.exporters.tensorrt.network import NO_DRIVER
from deploycli.exporters.tensorrt.readback import EngineReport, network_io
from deploycli.models.errors import BuildError, EnvironmentUnsuitable

if TYPE_CHECKING:
    import tensorrt as trt

    from deploycli.exporters.bundle.engine import GpuRecord, PlanHeader
    from deploycli.exporters.tensorrt.callbacks import Log, Monitor
    from deploycli.exporters.tensorrt.job import Job

_NODE = re.compile(r"\[ONNX Layer: (.*)\]", re.DOTALL)

_MEMORY = re.compile(r"^Total (Weights|Activation) Memory: (\d+) bytes", re.IGNORECASE)


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
