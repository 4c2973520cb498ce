from __future__ import annotations

import inspect
import tempfile
import textwrap
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from tests.tensorrt_api import child, clients, names, stubs
from tests.tensorrt_api.bindings import VERSIONS
from tests.tensorrt_api.signatures import Kind, parse, signatures

each_version = pytest.mark.parametrize("version", VERSIONS)

FUNCTION = """
from pathlib import Path
import tensorrt as trt

def client(
    builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, parser: trt.OnnxParser,
    engine: trt.ICudaEngine, runtime: trt.Runtime, profile: trt.IOptimizationProfile, context: trt.IExecutionContext,
    logger: trt.Logger, tensor: trt.ITensor,
) -> object:
"""

GOOD = """
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    made = trt.Builder(logger).create_network(flags)
    assert made is not None
    trt.init_libnvinfer_plugins(logger, "")
    trt.OnnxParser(made, logger).parse_from_file(str(Path("model.onnx")))
    parser.parse(b"model", path="model.onnx")
    errors = [parser.get_error(place).desc() for place in range(parser.num_errors)]
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 30)
    config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    config.progress_monitor = None
    cache = config.create_timing_cache(b"")
    if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
        content = bytes(cache.serialize() or b"")
    shape: tuple[int, ...] = tuple(network.get_input(0).shape)
    profile.set_shape("images", (1, *shape[1:]), [8, 3, 224, 224], trt.Dims([16, 3, 224, 224]))
    index: int = config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return errors
    opened = runtime.deserialize_cuda_engine(plan)
    assert opened is not None
    names = [opened.get_tensor_name(place) for place in range(opened.num_io_tensors)]
    inputs = [name for name in names if opened.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    low, _, high = opened.get_tensor_profile_shape(inputs[0], 0)
    inspector = opened.create_engine_inspector()
    assert inspector is not None
    text: str = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    running = opened.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    assert running is not None
    running.set_device_memory(4096, opened.device_memory_size_v2)
    running.set_input_shape(inputs[0], (4, 3, 224, 224))
    running.set_tensor_address(inputs[0], 4096)
    done: bool = running.execute_async_v3(stream_handle=7)
    refitter = trt.OnnxParserRefitter(trt.Refitter(opened, logger), logger)
    flag_names = sorted(trt.BuilderFlag.__members__)
    return len(memoryview(plan)), bytes(plan), low[0], len(high), text, done, refitter, flag_names, index

class Monitor(trt.IProgressMonitor):
    def __init__(self) -> None:
        super().__init__()
    def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None: ...
    def phase_finish(self, phase_name: str) -> None: ...
    def step_complete(self, phase_name: str, step: int) -> bool:
        return step < 10

class Log(trt.ILogger):
    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        print(severity == trt.Logger.WARNING, msg)
"""

# What TensorRT 10 had.
REMOVED = {
    "builder_flag": "config.set_flag(trt.BuilderFlag.FP16)",
    "calibration_profile": "return config.set_calibration_profile(profile)",
    "device_memory_size": "return engine.device_memory_size",
    "quantization_flag": "config.set_quantization_flag(trt.QuantizationFlag.CALIBRATE_BEFORE_FUSION)",
    "fast_fp16": "return builder.platform_has_fast_fp16",
    "explicit_batch": "return trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
    "dynamic_range": "tensor.dynamic_range = (-1.0, 1.0)",
    "supports_model": "return parser.supports_model(b'')",
    "no_memory": "return engine.create_execution_context_without_device_memory()",
    "cublas": "return trt.TacticSource.CUBLAS",
}

# What is wrong with every version.
WRONG = {
    "unchecked_plan": "return bytes(builder.build_serialized_network(network, config))",
    "unchecked_engine": "return runtime.deserialize_cuda_engine(b'').num_layers",
    "unchecked_context": "return engine.create_execution_context().infer_shapes()",
    "unchecked_network": "return trt.OnnxParser(builder.create_network(), logger)",
    "unchecked_inspector": "return engine.create_engine_inspector().get_engine_information",
    "unchecked_cache": "config.set_timing_cache(config.create_timing_cache(b''), False)",
    "unchecked_profile": "config.add_optimization_profile(builder.create_optimization_profile())",
    "path": "parser.parse_from_file(Path('model.onnx'))",
    "text_for_bytes": "parser.parse('model.onnx')",
    "integer_for_enum": "config.set_flag(6)",
    "other_enum": "config.set_flag(trt.MemoryPoolType.WORKSPACE)",
    "text_for_number": "config.builder_optimization_level = '3'",
    "float_for_number": "config.max_aux_streams = 0.5",
    "swapped": "builder.build_serialized_network(config, network)",
    "too_few": "config.set_timing_cache(config.get_timing_cache())",
    "keyword": "config.set_memory_pool_limit(kind=trt.MemoryPoolType.WORKSPACE, pool_size=1)",
    "number_for_shape": "profile.set_shape('images', 1, 8, 16)",
    "old_attribute": "config.max_workspace_size = 1 << 30",
    "old_method": "return builder.build_cuda_engine(network)",
    "old_execution": "return context.execute_v2([1, 2, 3], 'extra')",
    "read_only": "engine.num_layers = 3",
    "called_property": "return engine.num_layers()",
    "not_constructible": "return trt.ICudaEngine()",
    "with_block": "with builder: pass",
    "memory_length": "return len(engine.serialize() or b'')",
    "unknown_member": "return trt.BuilderFlag.INT7",
}


@cache
def errors(version: str) -> dict[str, list[str]]:
    """mypy's lines by file, from one run on the product, the stub and the clients, which are called by their names."""
    child.require(version)
    clients = {"good": GOOD} | {name: "    " + code + "\n    return None\n" for name, code in (REMOVED | WRONG).items()}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{name}_client.py") for name in clients]
        for path, content in zip(files, clients.values(), strict=True):
            path.write_text(FUNCTION + content)
        found = defaultdict(list)
        for line in stubs.check(version, [*names.product_files(), stub_of(version), *files]):
            file = line.partition(":")[0]
            found[Path(file).name.removesuffix("_client.py") if file.startswith(folder) else file].append(line)
    return found


def stub_of(version: str) -> Path:
    return stubs.stub_folder(version) / "tensorrt/__init__.pyi"


def clients_in(found: dict[str, list[str]]) -> dict[str, list[str]]:
    return {file: lines for file, lines in found.items() if "/" not in file}


@each_version
def test_mistakes_are_type_errors_and_nothing_else_is(version: str) -> None:
    found = clients_in(errors(version))
    assert found.pop("good", []) == []
    expected = set(WRONG) if version.startswith("10.") else set(WRONG | REMOVED)
    assert set(found) == expected
    last = len(FUNCTION.splitlines()) + 1
    assert [line for lines in found.values() for line in lines if f"_client.py:{last}: " not in line] == []


@each_version
def test_every_call_of_the_product_has_the_right_types_and_the_stub_no_error_of_its_own(version: str) -> None:
    found = errors(version)
    assert [line for file, lines in found.items() if file not in clients_in(found) for line in lines] == []


@each_version
def test_the_stub_has_every_name_and_no_docstring(version: str) -> None:
    child.require(version)
    text = stub_of(version).read_text("utf-8")
    assert '"""' not in text
    classes = set(child.call(version, clients.class_names))
    assert len(classes) > 150
    assert {name for name in classes if f"class {name.rpartition('.')[2]}" not in text} == set()
    unknown = [line for line in text.splitlines() if "*args: Any" in line]
    assert unknown == []  # every signature could be read


def test_no_file_is_no_error() -> None:
    assert stubs.check("0.0", []) == []


def test_what_is_not_installed_is_not_counted_but_tensorrt_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child.require(VERSIONS[-1])
    (tmp_path / "absent_client.py").write_text("import no_such_package\nimport tensorrt\n")
    assert stubs.check(VERSIONS[-1], [tmp_path / "absent_client.py"]) == []
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(stubs, "stub_folder", lambda version: tmp_path / "empty")
    monkeypatch.setattr(stubs, "CONFIG", tmp_path / "none.toml")
    (tmp_path / "none.toml").write_text("[tool.mypy]\n")
    (tmp_path / "stubless_client.py").write_text("import no_such_package\nimport tensorrt\n")
    (error,) = stubs.check(VERSIONS[-1], [tmp_path / "stubless_client.py"])
    assert '"tensorrt"' in error


KNOWN = ("Builder", "Dims", "ILogger.Severity", "BuilderFlag", "ParserError")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("int", Kind("int")),
        ("typing.SupportsInt", Kind("int")),
        ("List[Tuple[int, str]]", Kind("list", (Kind("tuple", (Kind("int"), Kind("str"))),))),
        ("collections.abc.Sequence[typing.SupportsInt]", Kind("list", (Kind("int"),))),
        ("tensorrt.tensorrt.ILogger.Severity", Kind("ILogger.Severity")),
        ("nvinfer1::IBuilder", Kind("Builder")),
        ("nvinfer1::v_1_0::IParserError", Kind("ParserError")),
        ("typing_extensions.Buffer", Kind("buffer")),
        ("detail::accessor<detail::accessor_policies::str_attr>", Kind("any")),
        ("nvinfer1::NotKnown", Kind("any")),
    ],
)
def test_types_are_read(text: str, kind: Kind) -> None:
    assert parse(text, frozenset(KNOWN)) == kind


def test_signatures_are_read() -> None:
    doc = """
    make(*args, **kwargs)
    Overloaded function.

    1. make(self: tensorrt.tensorrt.Builder, flag: tensorrt.tensorrt.BuilderFlag = <BuilderFlag.A, B: 0>) -> int


        Text, make(self) -> None

    2. make(self: tensorrt.tensorrt.Builder, in: str, arg1: object = None, shape: tensorrt.tensorrt.Dims = ()) -> None
    """
    first, second = signatures("make", textwrap.dedent(doc).strip(), KNOWN)
    assert [parameter.name for parameter in first.parameters] == ["self", "flag"]
    assert first.parameters[1].default == "<BuilderFlag.A, B: 0>"
    assert second.bound().positional == 2
    assert second.parameters[-1].kind == Kind("Dims")
    assert signatures("make", "Make something.", KNOWN) == []
    assert signatures("make", None, KNOWN) == []
    assert inspect.getdoc(signatures)
