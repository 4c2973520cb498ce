"""NVIDIA's two compilers behind one interface: `deploycli.exporters.tensorrt.build_engine` drives either.

Import this after `deploycli.exporters.tensorrt.library.use`, in the child process that builds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from deploycli.exporters.bundle.engine import IoTensor
from deploycli.models.spec import numpy_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    import tensorrt as trt

    from deploycli.exporters.bundle.engine import GpuRecord, PlanHeader
    from deploycli.exporters.target.settings import BuildSettings
    from deploycli.exporters.tensorrt.callbacks import Monitor


@dataclass(frozen=True)
class EngineReport:
    """What was read from an engine.

    Attributes:
        layers: JSON of the engine inspector, as it is, or None where the engine could not be inspected.
        io: inputs and outputs.
        facts: figures by name; memory in bytes.
    """

    layers: str | None
    io: tuple[IoTensor, ...]
    facts: Mapping[str, Any]


class Compiler(Protocol):
    """What differs between the two, for one build."""

    @property
    def gpu(self) -> GpuRecord | None:
        """Where kernels are measured, or None where none are."""

    def start(self) -> None:
        """Do what comes before everything else.

        Raises:
            BuildError: it fails.
        """

    def configure(self, builder: trt.Builder, monitor: Monitor) -> trt.IBuilderConfig:
        """Return the configuration of the build, without its profile.

        Args:
            builder: of the build.
            monitor: must outlive the build.

        Raises:
            BuildError: the compiler does not take a setting.
        """

    def adapt(self, network: trt.INetworkDefinition) -> None:
        """Change what the parser has made of the file, so that it compiles; it computes the same."""

    def read(
        self, plan: bytes, header: PlanHeader, config: trt.IBuilderConfig, network: trt.INetworkDefinition
    ) -> EngineReport:
        """Say what was built: from the plan and from what the compiler tells of it, not from what was asked for.

        Raises:
            BuildError: the compiler cannot describe its own engine.
        """

    def keep(self) -> str:
        """Write what the next build shall know; return the hash of the timing cache, empty where there is none."""

    def advice(self) -> str:
        """Say what to try where no engine was built; may be empty."""


def network_io(network: trt.INetworkDefinition, settings: BuildSettings) -> tuple[IoTensor, ...]:
    """Return inputs and outputs as the network has them, for an engine that is not inspected."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    profiles = settings.profile
    return (
        *(
            IoTensor(t.name, "input", numpy_name(t.dtype.name), tuple(t.shape), (p.min, p.opt, p.max))
            for t in inputs
            for p in [profiles[t.name]]
        ),
        *(IoTensor(t.name, "output", numpy_name(t.dtype.name), tuple(t.shape)) for t in outputs),
    )
