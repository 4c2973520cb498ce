"""What the classes of a model are called."""

from __future__ import annotations

import importlib
import json
import re
from typing import TYPE_CHECKING, Any

from deploycli.models.errors import UsageError
from deploycli.models.files import text_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

LABELS_KEY = "labels"
"""Metadata of an ONNX file: the names of the classes, a JSON list."""

IMAGENET = 1000
"""Classes of ImageNet-1k."""


def read_labels(path: Path) -> tuple[str, ...]:
    """Read the names of classes, in order: one a line, a JSON list, or a JSON object of index to name.

    Raises:
        UsageError: the file cannot be read, or is none of these; a name is empty, or a number is missing.
    """
    expected = 'one class name a line, a JSON list of names, or a JSON object such as {"0": "tench"}'
    try:
        text = text_of(path, "utf-8-sig")
        if path.suffix == ".json":
            return _checked(_named(json.loads(text), path, expected), path)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"the labels {path} cannot be read: {error}", expected=expected) from error
    names = [line.strip() for line in text.removesuffix("\n").split("\n")]  # not splitlines: Triton reads lines so
    if "" in names:
        raise UsageError(f"{path} has an empty line {names.index('') + 1}", expected="one class name a line")
    return _checked(names, path)


def known_labels(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of classes in the metadata of an ONNX file; nothing where there are none that can be read."""
    try:
        names = json.loads(metadata.get(LABELS_KEY, "[]"))
    except (ValueError, RecursionError):
        return ()
    listed = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    return tuple(names) if listed and not any(re.search(r"[\r\n]", name) for name in names) else ()


def _named(value: Any, path: Path, expected: str) -> list[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        if set(value) == {str(index) for index in range(len(value))}:
            return [value[str(index)] for index in range(len(value))]
        indices = {index: name for name, index in value.items() if isinstance(index, int)}
        if set(indices) == set(range(len(value))):  # as ImageFolder.class_to_idx
            return [indices[index] for index in range(len(value))]
        raise UsageError(
            f"the labels {path} do not number {len(value)} classes from 0 to {len(value) - 1}", expected=expected
        )
    raise UsageError(f"the labels {path} are {type(value).__name__}", expected=expected)


def _checked(names: list[Any], path: Path) -> tuple[str, ...]:
    for place, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise UsageError(f"{path} has no name for class {place}", expected="a name for each class")
        if re.search(r"[\r\n]", name):
            raise UsageError(f"{path}: the name of class {place} has a line break", expected="names of one line")
    return tuple(names)


def require_fitting(labels: tuple[str, ...], classes: int | None, where: str) -> None:
    """Refuse names of another number of classes.

    Raises:
        UsageError: there are more or fewer, or the model names no classes.
    """
    if classes is None:
        raise UsageError(f"{where} names {len(labels)} classes, and no output is [batch, classes]", hint="leave it out")
    if len(labels) != classes:
        raise UsageError(f"{where} names {len(labels)} classes", expected=f"{classes}, which the model has")


def library_labels(family: str, module: nn.Module, *, published: bool) -> tuple[str, ...]:
    """Return what the model's library calls its classes; nothing where it does not say.

    Args:
        family: of the model.
        module: the model.
        published: its weights are those that the library publishes.
    """
    if family == "hf":
        names = getattr(getattr(module, "config", None), "id2label", None) or {}
        ordered = [str(names[index]) for index in range(len(names)) if index in names]
        told = len(ordered) == len(names) and any(name != f"LABEL_{index}" for index, name in enumerate(ordered))
        return tuple(ordered) if told else ()
    config = getattr(module, "pretrained_cfg", None) or {}
    if names := config.get("label_names"):
        return tuple(map(str, names)) if len(names) == getattr(module, "num_classes", 0) else ()
    if family == "timm" and published and getattr(module, "num_classes", 0) == IMAGENET:
        info = importlib.import_module("timm.data").ImageNetInfo()
        return tuple(info.index_to_description(index) for index in range(IMAGENET))
    return ()
