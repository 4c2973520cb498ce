"""Weights in files of their own, which onnx_ir reads only as long as a file has one name."""

from __future__ import annotations

import onnx_ir as ir

from deploycli.models.errors import IntegrityError


def map_external(model: ir.Model) -> None:
    """Map the external data of a model into memory, which reads nothing yet.

    The files of a bundle that is extended have a second name for a while, and onnx_ir takes that for an attack.

    Raises:
        IntegrityError: a file has a second name already, or is too short.
    """
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            try:
                value.const_value.numpy()
            except ValueError as error:
                raise IntegrityError(
                    f"{name} cannot be read: {error}",
                    expected="external data in a file of its own, as it was written",
                    hint="copy the folder, without hard links",
                ) from error
