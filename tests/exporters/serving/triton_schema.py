"""The part of Triton's model_config.proto that our configurations use, as real protobuf messages.

Names, numbers and types are those of
https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto; `tritonclient` has the compiled
file, but asks for older versions of protobuf and ml_dtypes than the other packages do. Nested messages stand side by
side here, which the text format does not show.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

ENUMS = {
    "DataType": "INVALID BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64 STRING BF16",
    "Kind": "AUTO GPU CPU MODEL",
}
PREFIXES = {"DataType": "TYPE_", "Kind": "KIND_"}
MESSAGES = {  # field, number, type; * repeats it, % makes it a map from strings
    "ModelTensorReshape": "shape 1 *int64",
    "ModelInput": "name 1 string, data_type 2 DataType, dims 4 *int64, reshape 5 ModelTensorReshape",
    "ModelOutput": "name 1 string, data_type 2 DataType, dims 3 *int64, reshape 5 ModelTensorReshape, "
    "label_filename 4 string",
    "Latest": "num_versions 1 uint32",
    "ModelVersionPolicy": "latest 1 Latest",
    "ModelInstanceGroup": "name 1 string, kind 4 Kind, count 2 int32, gpus 3 *int32, profile 5 *string",
    "ModelDynamicBatching": "preferred_batch_size 1 *int32, max_queue_delay_microseconds 2 uint64",
    "Shape": "dim 1 *int64",
    "GraphSpec": "batch_size 1 int32, input 2 %Shape",
    "Cuda": "graphs 1 bool, busy_wait_events 2 bool, graph_spec 3 *GraphSpec, output_copy_stream 4 bool",
    "Accelerator": "name 1 string, parameters 2 %string",
    "ExecutionAccelerators": "gpu_execution_accelerator 1 *Accelerator, cpu_execution_accelerator 2 *Accelerator",
    "ModelOptimizationPolicy": "cuda 3 Cuda, execution_accelerators 4 ExecutionAccelerators",
    "ModelParameter": "string_value 1 string",
    "WarmupInput": "data_type 1 DataType, dims 2 *int64, zero_data 3 bool, random_data 4 bool",
    "ModelWarmup": "name 1 string, batch_size 2 uint32, inputs 3 %WarmupInput, count 4 uint32",
    "ModelConfig": "name 1 string, platform 2 string, backend 17 string, version_policy 3 ModelVersionPolicy, "
    "max_batch_size 4 int32, input 5 *ModelInput, output 6 *ModelOutput, optimization 12 ModelOptimizationPolicy, "
    "dynamic_batching 11 ModelDynamicBatching, instance_group 7 *ModelInstanceGroup, default_model_filename 8 string, "
    "parameters 14 %ModelParameter, model_warmup 16 *ModelWarmup",
}


@cache
def message_class() -> Any:
    """Build ModelConfig."""
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values.split()):
            enum.value.add(name=PREFIXES[name] + value, number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in fields.split(", "):
            _add(message, *field.split())
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


def _add(message: descriptor_pb2.DescriptorProto, name: str, number: str, kind: str) -> None:
    types = descriptor_pb2.FieldDescriptorProto
    field = message.field.add(name=name, number=int(number))
    bare = kind.lstrip("*%")
    if kind.startswith("%"):
        entry = message.nested_type.add(name=f"{name.title().replace('_', '')}Entry")
        entry.options.map_entry = True
        _add(entry, "key", "1", "string")
        _add(entry, "value", "2", bare)
        bare = f"{message.name}.{entry.name}"
    field.label = types.LABEL_OPTIONAL if kind == bare else types.LABEL_REPEATED
    if bare in ENUMS:
        field.type, field.type_name = types.TYPE_ENUM, f".inference.{bare}"
    elif bare[0].isupper():
        field.type, field.type_name = types.TYPE_MESSAGE, f".inference.{bare}"
    else:
        field.type = getattr(types, f"TYPE_{bare.upper()}")


def parse(text: str) -> Any:
    """Read a configuration as Triton does: an unknown name, a wrong type or a bad literal is an error."""
    return text_format.Parse(text, message_class()())
