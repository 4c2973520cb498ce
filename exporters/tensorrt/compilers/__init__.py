"""NVIDIA's two compilers behind one interface: `deploycli.exporters.tensorrt.builder` drives either.

Import this after `deploycli.exporters.tensorrt.library.use`, in the child process that builds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from deploycli.exporters.target.product import RTX

if TYPE_CHECKING:
    import tensorrt as trt

    from deploycli.exporters.bundle.engine import GpuRecord, PlanHeader
    from deploycli.exporters.tensorrt.callbacks import Log, Monitor
    from deploycli.exporters.tensorrt.job import Job
    from deploycli.exporters.tensorrt.readback import EngineReport


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


def compiler_of(job: Job, log: Log) -> Compiler:
    """Return the compiler of a job.

    Raises:
        EnvironmentUnsuitable: it needs a GPU, and there is none.
    """
    if job.product is RTX:
        from deploycli.exporters.tensorrt.compilers.rtx import Rtx

        return Rtx(job, log)
    from deploycli.exporters.tensorrt.compilers.tensorrt import TensorRt

    return TensorRt(job, log)
