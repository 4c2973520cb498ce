"""The sidecar of a plan: what it is, what it was built from and with, which kernels it launches, and whether this is
still the file.

A plan is executable: TensorRT's own check of it detects no tampering. So its hash, the version in its header and the
GPU are compared with the sidecar before TensorRT is given a single byte. Source: TensorRT, "Security" and "Version
compatibility".
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from deploycli.exporters.bundle.files import require_inside, unreadable, write_whole
from deploycli.exporters.bundle.manifest import Precision
from deploycli.exporters.target.product import PRODUCTS, RTX, TENSORRT, CompilerName, Product
from deploycli.exporters.target.settings import BuildSettings
from deploycli.exporters.target.targets import DEFAULT_TARGETS, TARGETS, Capability, dotted, named
from deploycli.models.codec import Count, Positive, Sha256, SomeSha256, load
from deploycli.models.errors import EnvironmentUnsuitable, IntegrityError, InvalidValue, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


SCHEMA_VERSION = 1
ENGINES = "engines"
"""Folder of a bundle."""

PLAN_SUFFIX = ".plan"
_BUILD_AGAIN = "build it again: deploycli build-trt"
_AMPERE = (8, 0)
HEADER_BYTES = 36
_TENSORRT_BYTES = 28


@dataclass(frozen=True)
class PlanHeader:
    """What a plan says of itself.

    Attributes:
        product: what wrote it.
        version: major, minor, patch and build; of the build its lowest eight bits.
        targets: compute capabilities that it was compiled for; empty for TensorRT, whose plans are for one GPU.
    """

    product: Product
    version: tuple[int, int, int, int]
    targets: tuple[Capability, ...] = ()

    def __str__(self) -> str:
        """Return product and version."""
        return f"{self.product.title} {'.'.join(map(str, self.version))}"


def plan_header(head: bytes) -> PlanHeader | None:
    """Read the first `HEADER_BYTES` of a file; None where it is no plan."""
    product = next((p for p in PRODUCTS.values() if head.startswith(p.tag)), None)
    if product is None or len(head) < (HEADER_BYTES if product is RTX else _TENSORRT_BYTES):
        return None
    if struct.unpack_from("<I", head, 4) != (0,):  # the version of the serialisation
        return None
    major, minor, patch, build = head[24:28]
    targets: tuple[Capability, ...] = ()
    if product is RTX:
        (mask,) = struct.unpack_from("<I", head, 32)
        targets = tuple(target for bit, target in enumerate(TARGETS) if mask & 1 << bit)  # a bit for each
    return PlanHeader(product, (major, minor, patch, build), targets)


def header_of_plan(path: Path) -> PlanHeader | None:
    """Read the header of a file; None where it is no plan."""
    with path.open("rb") as file:
        return plan_header(file.read(HEADER_BYTES))


@dataclass(frozen=True)
class GpuRecord:
    """The GPU that a plan was built on.

    Attributes:
        name: such as ``NVIDIA L4``.
        compute_capability: major and minor.
        driver: version of the driver, or empty where it is not known.
        memory: bytes.
    """

    name: str
    compute_capability: tuple[Count, Count]
    driver: str = ""
    memory: Count = 0

    @property
    def slug(self) -> str:
        """What it is called in the names of files: ``sm89-nvidia-l4``."""
        major, minor = self.compute_capability
        return f"sm{major}{minor}-{re.sub(r'[^a-z0-9]+', '-', self.name.lower()).strip('-')}"


@dataclass(frozen=True)
class IoTensor:
    """An input or output of an engine.

    Attributes:
        name: its name.
        mode: ``input`` or ``output``.
        dtype: NumPy name of the element type.
        shape: sizes, -1 for a dynamic axis.
        profile: smallest, best and largest shape of the first optimization profile; of inputs only.
    """

    name: str
    mode: Annotated[str, Meta(pattern=r"^(input|output)\Z")]
    dtype: str
    shape: tuple[Annotated[int, Meta(ge=-1, le=2**63 - 1)], ...]
    profile: tuple[tuple[Positive, ...], ...] = ()

    def __post_init__(self) -> None:
        """Refuse an input whose batch nothing says."""
        if self.mode == "input" and not all(map(_has_batch, self.profile or (self.shape,))):
            raise InvalidValue(f"the shapes of the input {self.name!r}", expected="a batch axis of a known size")


@dataclass(frozen=True)
class Sidecar:
    """All that is known of a plan.

    Attributes:
        plan: name of the plan's file, beside the sidecar.
        sha256: its hash.
        size: its bytes.
        precision: what it was built as.
        onnx: name of the ONNX file of the bundle that it was built from.
        onnx_sha256: its hash, external data included.
        tensorrt: version of the compiler, four parts.
        gpu: where it was built; None of TensorRT for RTX, which needs none.
        settings: what it was built with.
        io: its inputs and outputs.
        layers: figures of its layers, of its kernels and of what its precision was proven on.
        assertions: what was asserted of its precision, and held; empty where a plan may not be opened to look.
        facts: read back from the engine: hardware compatibility, whether it can be refitted, device memory.
        timing_cache_sha256: of the timing cache that was used, or empty.
        seconds: how long the build took.
        tool_version: version of deploycli.
        built_at: time of the build, UTC.
        unreleasable: why it must not be shipped, or empty.
        compiler: which of NVIDIA's two compilers built it.
        targets: compute capabilities that it was compiled for, of TensorRT for RTX.
        kernels: what it launches, in the order of execution; empty where a plan may not be opened to look.
        schema_version: of this layout.
    """

    plan: str
    sha256: Sha256
    size: Count
    precision: Precision
    onnx: Annotated[str, Meta(pattern=r"^(?!\.{1,2}\Z)[^/\\\0]+\Z")]
    onnx_sha256: Sha256
    tensorrt: Annotated[str, Meta(pattern=r"^[0-9]{1,9}(\.[0-9]{1,9}){2,3}")]
    gpu: GpuRecord | None
    settings: BuildSettings
    io: tuple[IoTensor, ...]
    layers: Mapping[str, Any]
    assertions: tuple[str, ...]
    facts: Mapping[str, Any]
    timing_cache_sha256: SomeSha256
    seconds: Annotated[float, Meta(ge=0)]
    tool_version: str
    built_at: str
    unreleasable: str = ""
    compiler: CompilerName = "tensorrt"
    targets: tuple[Capability, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    schema_version: int = field(default=SCHEMA_VERSION)

    def __post_init__(self) -> None:
        """Refuse an engine that takes nothing, or that is for no GPU."""
        if not any(tensor.mode == "input" for tensor in self.io):
            raise InvalidValue("no input in `io`", expected="one or more")
        if (self.gpu is None) != (self.product is RTX) or bool(self.targets) != (self.product is RTX):
            raise InvalidValue(
                f"the GPUs of an engine of {self.product.title}",
                expected="`targets` and no `gpu`" if self.product is RTX else "a `gpu` and no `targets`",
            )

    @property
    def product(self) -> Product:
        """The compiler that built it."""
        return PRODUCTS[self.compiler]

    @property
    def runs_on(self) -> str:
        """The GPUs that it is for, in words."""
        if self.gpu is None:
            return named(self.targets)
        return f"{self.gpu.name}, compute capability {dotted(self.gpu.compute_capability)}"

    def kernels_of(self, profile: int) -> tuple[Kernel, ...]:
        """Its kernels in one optimization profile, the first of which is 0; none where they are not told apart."""
        return tuple(kernel for kernel in self.kernels if kernel.profile == profile)

    @property
    def first_kernels(self) -> tuple[Kernel, ...]:
        """Its kernels in the first optimization profile."""
        return self.kernels_of(0)

    @property
    def totals(self) -> KernelTotals:
        """Its kernels in the first optimization profile, counted."""
        return KernelTotals.of(self.first_kernels)

    @property
    def batches(self) -> tuple[int, int]:
        """The smallest and the largest batch that the engine takes."""
        inputs = [tensor.profile or (tensor.shape,) for tensor in self.io if tensor.mode == "input"]
        ranges = [(max(shapes[0][0] for shapes in inputs), min(shapes[-1][0] for shapes in inputs))]
        for profile in self.settings.more_profiles:
            found = profile.values()
            ranges.append((max(r.min[0] for r in found), min(r.max[0] for r in found)))
        return min(low for low, _ in ranges), max(high for _, high in ranges)

    def to_json(self) -> dict[str, Any]:
        """Return the sidecar as JSON values."""
        return asdict(self)

    def dumps(self) -> str:
        """Return the text of the file."""
        return json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"

    def save(self, folder: Path) -> Path:
        """Write the sidecar beside its plan, whole or not at all; the plan must be there already.

        Raises:
            EnvironmentUnsuitable: it cannot be written.
        """
        path = sidecar_of(folder / self.plan)
        write_whole(path, self.dumps().encode())
        return path

    @classmethod
    def load(cls, path: Path) -> Sidecar:
        """Read a sidecar.

        Raises:
            IntegrityError: there is none, it is malformed, or it names a file outside its bundle.
            EnvironmentUnsuitable: it cannot be read.
            UsageError: an unknown schema version.
        """
        try:
            require_inside(path, path.parent.parent)
            sidecar = load(path, cls, what="a sidecar", hint=_BUILD_AGAIN, version=SCHEMA_VERSION)
        except FileNotFoundError as error:
            raise IntegrityError(
                f"the plan has no sidecar {path.name}", expected="plan and sidecar together", hint=_BUILD_AGAIN
            ) from error
        except OSError as error:
            raise unreadable(path, error) from error
        if sidecar.plan != f"{path.stem}{PLAN_SUFFIX}":
            raise IntegrityError(f"{path} names the plan {sidecar.plan!r}", expected=f"{path.stem}{PLAN_SUFFIX}")
        return sidecar

    def check_file(self, folder: Path) -> Path:
        """Compare the plan with what was recorded, without opening it in TensorRT; return its path.

        Raises:
            IntegrityError: it is missing, changed, reached through a link out of the bundle, no plan, or one of another
                TensorRT than is recorded.
        """
        self.read_plan(folder)
        return folder / self.plan

    def read_plan(self, folder: Path) -> bytes:
        """Return the very bytes that were compared with the record: between two readings a file may be replaced.

        Raises:
            IntegrityError: see `check_file`.
        """
        plan = folder / self.plan
        require_inside(plan, folder.parent)
        try:
            content = plan.read_bytes()
        except FileNotFoundError as error:
            raise IntegrityError(
                f"{plan} is missing, its sidecar is there", expected="both", hint=_BUILD_AGAIN
            ) from error
        except OSError as error:
            raise unreadable(plan, error) from error
        if (found := hashlib.sha256(content).hexdigest()) != self.sha256:
            raise IntegrityError(
                f"{plan} has changed: {len(content)} bytes, sha256 {found}",
                expected=f"{self.size} bytes, sha256 {self.sha256}",
                hint=_BUILD_AGAIN,
            )
        if (header := plan_header(content[:HEADER_BYTES])) is None:
            raise IntegrityError(f"{plan} does not begin as a TensorRT plan does", expected="a plan", hint=_BUILD_AGAIN)
        version = tuple(part & 0xFF for part in _numbers(self.tensorrt))  # the header holds the lowest eight bits
        if header.product is not self.product or header.version[: len(version)] != version:
            raise IntegrityError(
                f"{plan} was written by {header}, as its header says",
                expected=f"{self.product.title} {self.tensorrt}, as its sidecar says",
                hint=_BUILD_AGAIN,
            )
        if header.targets != self.targets:
            raise IntegrityError(
                f"{plan} is for {named(header.targets) if header.targets else 'no GPU'}, as its header says",
                expected=f"{named(self.targets)}, as its sidecar says",
                hint=_BUILD_AGAIN,
            )
        return content

    def check_host(self, tensorrt: str, compute_capability: tuple[int, int], gpu: str) -> None:
        """Say plainly that this machine cannot run the plan, before TensorRT says it otherwise.

        A plan is for the TensorRT, all four parts, and the GPU that built it. A version compatible one runs on later
        versions of the same major, too, and one of 10 on 11. Source: TensorRT, "Support policies".

        Args:
            tensorrt: version that is installed, four parts.
            compute_capability: of this GPU.
            gpu: name of this GPU.

        Raises:
            EnvironmentUnsuitable: another version or another GPU than the plan was built for.
        """
        title, package = self.product.title, self.product.module.replace("_", "-")
        if not self._runs_on(tensorrt):
            later = self.settings.version_compatible
            raise EnvironmentUnsuitable(
                f"{self.plan} was built by {title} {self.tensorrt}, here is {tensorrt}",
                expected=f"{title} {self.tensorrt}"
                + (", or a later one of the majors that it covers" if later else ", for it is not version compatible"),
                hint=f"pip install {package}=={self.tensorrt}, or build it again here",
            )
        if self.gpu is None:
            if compute_capability in self.targets:
                return
            raise EnvironmentUnsuitable(
                f"{self.plan} is for {named(self.targets)}, here is {gpu} ({dotted(compute_capability)})",
                expected="a GPU that it was compiled for",
                hint=f"deploycli build-trt --compiler rtx --gpu {dotted(compute_capability)}"
                if compute_capability in TARGETS
                else "deploycli build-trt --compiler tensorrt, on this machine",
            )
        level, built = self.settings.hardware_compatibility, self.gpu.compute_capability
        fits = {
            "none": compute_capability == built and gpu == self.gpu.name,
            "same-compute-capability": compute_capability == built,
            "ampere+": compute_capability >= _AMPERE,
        }[level]
        if not fits:
            wider = "same-compute-capability" if compute_capability == built else "ampere+"
            possible = level != "ampere+" and (wider != "ampere+" or min(compute_capability, built) >= _AMPERE)
            raise EnvironmentUnsuitable(
                f"{self.plan} was built on {self.gpu.name} (compute capability {dotted(built)}), "
                f"here is {gpu} ({dotted(compute_capability)})",
                expected=f"a GPU that its hardware compatibility, {level}, covers",
                hint="build it again here" + (f", or there with --hardware-compatibility {wider}" if possible else ""),
            )

    def _runs_on(self, tensorrt: str) -> bool:
        if tensorrt == self.tensorrt:
            return True
        here, built = _numbers(tensorrt), _numbers(self.tensorrt)
        return self.settings.version_compatible and here >= built and (here[0] == built[0] or here[0] == 11)


def sidecar_of(plan: Path) -> Path:
    """Return where the sidecar of a plan is."""
    return plan.with_suffix(".json")


def engine_name(precision: str, *capabilities: Capability, version: str, product: Product = TENSORRT) -> str:
    """Return the name of a plan's file: ``fp16-sm89-trt10.13.3.9.plan``, or ``fp16-rtx1.7.1.116.plan`` for RTX GPUs
    but Turing."""
    gpus = () if capabilities == DEFAULT_TARGETS else tuple(f"sm{major}{minor}" for major, minor in capabilities)
    return f"{'-'.join((precision, *gpus, product.mark))}{version}{PLAN_SUFFIX}"


def sidecar_of_plan(plan: Path) -> Sidecar:
    """Return the sidecar of a plan, which is compared with it.

    Raises:
        UsageError: there is no such plan.
        IntegrityError: the plan has no sidecar, or is not what it says.
    """
    if not plan.is_file():
        raise UsageError(f"there is no engine {plan}", expected=f"a {PLAN_SUFFIX} that deploycli build-trt wrote")
    sidecar = Sidecar.load(sidecar_of(plan))
    sidecar.check_file(plan.parent)
    return sidecar


def sidecars(folder: Path) -> Iterator[Sidecar]:
    """Yield the sidecars of a folder of engines, by name.

    Raises:
        IntegrityError: a plan without a sidecar, a sidecar that is malformed, or a folder that is a link out of the
            bundle.
        EnvironmentUnsuitable: the folder cannot be read.
    """
    if not folder.is_dir():
        return
    require_inside(folder, folder.parent)
    try:
        names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise unreadable(folder, error, "folder") from error
    for name in names:
        if name.endswith(PLAN_SUFFIX) and not sidecar_of(folder / name).is_file():
            raise IntegrityError(
                f"{folder / name} has no sidecar", expected="plan and sidecar together", hint=_BUILD_AGAIN
            )
    for name in names:
        if name.endswith(".json"):
            yield Sidecar.load(folder / name)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isascii() and part.isdigit())


def _has_batch(shape: tuple[int, ...]) -> bool:
    return len(shape) > 0 and shape[0] > 0


@dataclass(frozen=True)
class Kernel:
    """One kernel that an engine launches.

    Attributes:
        name: the compiler's name of it.
        kind: the compiler's type of layer.
        precision: the narrowest type that it reads.
        product: whether it is a matrix product, a convolution or fused attention.
        attention: whether it is fused attention.
        reads: types and shapes of the activations that it reads, -1 for an axis that is not fixed.
        writes: the same of those that it writes.
        nodes: the ONNX nodes in it, in the order of the graph.
        module: the PyTorch module that it belongs to: of its product, or else of its last node; may be empty.
        moved: bytes of activations that it reads and writes for one image; None where that does not follow.
        profile: number of the optimization profile that it is for.
    """

    name: str
    kind: str
    precision: str
    product: bool
    attention: bool
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    nodes: tuple[str, ...]
    module: str
    moved: Count | None
    profile: Count = 0


@dataclass(frozen=True)
class KernelTotals:
    """Kernels, counted.

    Attributes:
        launches: how many.
        attention: those that are fused attention.
        products: precision -> matrix products, convolutions and fused attention.
        moved: bytes of activations for one image, of those kernels where they are known.
        unknown: kernels whose bytes are not known.
    """

    launches: int
    attention: int
    products: Mapping[str, int]
    moved: int
    unknown: int

    @classmethod
    def of(cls, kernels: Sequence[Kernel]) -> KernelTotals:
        """Count kernels."""
        products: dict[str, int] = {}
        for kernel in kernels:
            if kernel.product:
                products[kernel.precision] = products.get(kernel.precision, 0) + 1
        return cls(
            len(kernels),
            sum(kernel.attention for kernel in kernels),
            products,
            sum(kernel.moved or 0 for kernel in kernels),
            sum(kernel.moved is None for kernel in kernels),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "launches": self.launches,
            "attention": self.attention,
            "products": dict(self.products),
            "moved": self.moved,
            "moved_unknown": self.unknown,
        }


def by_module(kernels: Sequence[Kernel], depth: int) -> dict[str, KernelTotals]:
    """Return totals by PyTorch module, in the order of execution; ``depth`` parts of a module's path count."""
    groups: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(_cut(kernel.module, depth), []).append(kernel)
    return {module: KernelTotals.of(group) for module, group in groups.items()}


def readable_depth(*engines: Sequence[Kernel], most: int = 32) -> int:
    """Return how many parts of modules' paths give a table of at most so many rows, if any does."""
    kernels = [kernel for engine in engines for kernel in engine]
    deepest = max((kernel.module.count(".") + 1 for kernel in kernels), default=1)
    depths = (d for d in range(deepest, 1, -1) if len({_cut(kernel.module, d) for kernel in kernels}) <= most)
    return next(depths, 1)


def _cut(module: str, depth: int) -> str:
    return ".".join(module.split(".")[:depth])
