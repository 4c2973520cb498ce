"""Checkpoints: read without running anything in them, translated to official names, loaded strictly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from deploycli.models.build import build, family
from deploycli.models.checkpoint_file import read_weights
from deploycli.models.errors import UsageError
from deploycli.models.external import CLASSES, classes_of
from deploycli.models.files import sha256_of
from deploycli.models.spec import ModelSpec, Weights
from deploycli.models.values import converted, shown, some

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from deploycli.models.family import Family


@dataclass(frozen=True)
class LoadReport:
    """What became of each key, by official name.

    Attributes:
        loaded: copied into the model.
        renamed: those of the loaded or recomputed ones that had another name in the file.
        recomputed: derived buffers that the file holds and that equal the model's own.
        resampled: those of the loaded ones that were interpolated for another image size than the file's.
        missing: learned in the model, absent from the file.
        unexpected: in the file, absent from the model.
    """

    loaded: tuple[str, ...]
    renamed: tuple[str, ...]
    recomputed: tuple[str, ...]
    resampled: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        """Return the number of loaded, renamed, recomputed and resampled keys."""
        return {
            "loaded": len(self.loaded),
            "renamed": len(self.renamed),
            "recomputed": len(self.recomputed),
            "resampled": len(self.resampled),
        }


@dataclass(frozen=True)
class Loaded:
    """A model with weights from a file.

    Attributes:
        model: the module, in evaluation mode, float32.
        spec: the spec that it was built from; ``num_classes`` is the file's.
        weights: where the weights came from.
        report: what became of each key.
    """

    model: nn.Module
    spec: ModelSpec
    weights: Weights
    report: LoadReport


def load(
    spec: ModelSpec,
    path: Path,
    *,
    num_classes: int | None = None,
    entry: str | None = None,
    source: str = "checkpoint",
    origin: str = "",
) -> Loaded:
    """Build the model and load a checkpoint into it. Peak memory is about twice the weights.

    Args:
        spec: the model; its number of classes gives way to the checkpoint's.
        path: a ``.safetensors`` file, one that ``torch.save`` wrote, or an ``.npz`` archive of JAX, by any names that
            the family translates, with one prefix before all of them or none.
        num_classes: what the user asked for, None if nothing; an error if the checkpoint has another head.
        entry: which of the file's sets of weights; see :func:`deploycli.models.checkpoint_file.read_weights`.
        source: ``checkpoint`` or ``pretrained``, for the manifest.
        origin: the file's name in the manifest; by default the path as given.

    Raises:
        UsageError: the file cannot be read or holds pickled code; its keys, shapes or derived buffers do not belong to
            the model; it was made for another head, window or image size and cannot be adapted; or a weight is not
            finite, or of a type that would lose more than digits.
    """
    kind = family(spec.family)
    stored = read_weights(path, entry)
    sketch = _sketch(spec, kind)
    bare, prefix = _without_prefix(stored.tensors, sketch.state_dict())
    state, translated = kind.translate(bare)
    fitted = adapt(spec, state, num_classes=num_classes, sketch=sketch)
    kind.check_geometry(fitted.config, state)
    if kind.head in state and state[kind.head].shape[1:] != sketch.get_parameter(kind.head).shape[1:]:
        fitted = spec  # another model's head: refused below, and no reason to make one of its size
    model = sketch if fitted == spec and kind.strange else build(fitted)
    state, resampled = kind.resample(fitted.config, kind.rename(model, fitted.config, state))
    names = dict.fromkeys(translated.values())
    renamed = [translated.get(key, key) for key in bare] if prefix else list(names)
    in_file = {translated.get(key, key): prefix + key for key in bare if prefix or key in translated}
    remedy = _remedy(fitted, model, state) if kind.strange else ""
    report = load_strictly(model, state, kind, renamed=renamed, resampled=resampled, in_file=in_file, remedy=remedy)
    weights = Weights(
        source,
        path=origin or str(path),
        sha256=sha256_of(path),
        report=report.counts(),
        classes=classes_of(fitted.family, model),
        entry=stored.entry,
        others=stored.others,
        prefix=prefix,
    )
    return Loaded(model, fitted, weights, report)


def adapt(
    spec: ModelSpec, state: Mapping[str, Tensor], *, num_classes: int | None = None, sketch: nn.Module | None = None
) -> ModelSpec:
    """Return the spec with the number of classes that the checkpoint's head has.

    Args:
        spec: the model.
        state: the checkpoint by official names.
        num_classes: what the user asked for, None if nothing.
        sketch: a stranger's model of that spec, for its names and shapes; by default it is made.

    Raises:
        UsageError: the user asked for another number.
    """
    kind = family(spec.family)
    if kind.strange:
        classes = _head_of_another_size(state, sketch or build(spec), spec.family)
    else:
        classes = _head_size(state.get(kind.head))
    if classes is None:
        return spec  # the model's own, or a head that is reported when it is loaded
    option = CLASSES.get(spec.family, "")
    asked = num_classes or (spec.config["kwargs"].get(option) if kind.strange else None)
    if asked not in (None, classes):
        raise UsageError(
            f"the checkpoint's head has {classes} classes", expected=f"{asked}", hint=f"--num-classes {classes}"
        )
    if kind.strange:
        return replace(spec, config={**spec.config, "kwargs": {**spec.config["kwargs"], option: classes}})
    return replace(spec, config={**spec.config, "num_classes": classes})


def _head_size(head: Tensor | None) -> int | None:
    return head.shape[0] if head is not None and head.ndim and head.numel() else None


def _head_of_another_size(state: Mapping[str, Tensor], sketch: nn.Module, library: str) -> int | None:
    """Return how many classes a stranger's checkpoint has, where that is all that tells it from the model.

    A library's head has no name that is known here: it is what has as many rows as the model has classes, and other
    rows in the file.
    """
    own_classes = classes_of(library, sketch)
    if own_classes is None:
        return None
    sizes = set()
    for key, own in sketch.state_dict().items():
        if (found := state.get(key)) is None or found.shape == own.shape:
            continue
        if not (own.ndim and own.shape[0] == own_classes and found.ndim and found.shape[1:] == own.shape[1:]):
            return None
        sizes.add(_head_size(found))
    return sizes.pop() if len(sizes) == 1 else None


def _remedy(spec: ModelSpec, model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Say which option makes a stranger's model that a checkpoint of other keys or shapes may fit."""
    if spec.family not in CLASSES:
        return "--model-kwargs, with which the function makes the checkpoint's model"
    classes = classes_of(spec.family, model)
    own = model.state_dict()
    head = [key for key, value in own.items() if value.ndim and value.shape[0] == classes]
    missing = own.keys() - state.keys()
    if spec.family == "timm" and missing and missing <= set(head):
        return """--model-kwargs '{"num_classes": 0}', for a model without a head"""
    options = ["--model-kwargs, such as the image size it was trained at", "another model name"]
    sizes = {_head_size(state[key]) for key in head if key in state and state[key].shape[1:] == own[key].shape[1:]}
    if sizes - {classes, None}:
        options.insert(0, f"--num-classes {max(size for size in sizes if size)}")
    return ", or ".join(options)


def _sketch(spec: ModelSpec, kind: Family) -> nn.Module:
    """Return the model for its names and shapes; one of our own takes no memory for that, and no time."""
    if kind.strange:
        return build(spec)
    with torch.device("meta"):
        return kind.create(**spec.config)


def _without_prefix(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Remove what stands before every name, such as ``module.`` and ``model.``; return the state, and what it was.

    Wrappers put it there: DistributedDataParallel, torch.compile, a training framework. It is none where the model's
    own names begin with it.
    """
    bare, prefix = dict(state), ""
    while not any(key in own for key in bare):
        first = {key.partition(".")[0] for key in bare if "." in key.strip(".")}
        if len(first) != 1 or not all(key.partition(".")[2] for key in bare):
            return dict(state), ""
        outer = f"{first.pop()}."
        prefix += outer
        bare = {key.removeprefix(outer): value for key, value in bare.items()}
    return bare, prefix


def load_strictly(
    model: nn.Module,
    state: Mapping[str, Tensor],
    kind: Family,
    *,
    renamed: Sequence[str] = (),
    resampled: Sequence[str] = (),
    in_file: Mapping[str, str] | None = None,
    remedy: str = "",
) -> LoadReport:
    """Copy a checkpoint into a model, casting to the model's types, and account for every key.

    Derived buffers are not copied; those in the file must equal the model's own.

    Args:
        model: changed in place.
        state: the checkpoint by official names.
        kind: the model's family.
        renamed: official names of the keys that had another name in the file.
        resampled: official names of the keys that were interpolated for another image size.
        in_file: official name -> the name in the file, where it is another.
        remedy: what to try where the keys or shapes are another model's.

    Raises:
        UsageError: a key is missing or unexpected, a shape or a derived buffer differs, or a weight is not finite, or
            of a type that would lose more than digits.
    """
    own = model.state_dict()
    derived = {key for key in own if key.rpartition(".")[2] in kind.derived}
    report = LoadReport(
        loaded=tuple(key for key in own if key in state and key not in derived),
        renamed=tuple(dict.fromkeys(renamed)),  # a parameter that was merged from several keys counts once
        recomputed=tuple(key for key in own if key in state and key in derived),
        resampled=tuple(resampled),
        missing=tuple(key for key in own if key not in state and key not in derived),
        unexpected=tuple(key for key in state if key not in own),
    )
    names = in_file or {}
    _refuse_mismatch(report, own, state, names, remedy or "another model name; `deploycli list` shows them")
    with torch.no_grad():
        for key in report.loaded:
            own[key].copy_(converted(key, state[key], own[key], in_file=names.get(key, key)))
    return report


def _refuse_mismatch(
    report: LoadReport,
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    names: Mapping[str, str],
    remedy: str,
) -> None:
    faults = []
    if report.missing:
        faults.append(f"missing {some(report.missing)}")
    if report.unexpected:
        faults.append(f"unexpected {some(report.unexpected)}")
    reshaped = [key for key in own if key in state and own[key].shape != state[key].shape]
    if reshaped:
        faults.append(
            "other shapes "
            + some([f"{shown(key)} {list(state[key].shape)} instead of {list(own[key].shape)}" for key in reshaped])
        )
    else:
        derived = {key: converted(key, state[key], own[key], in_file=names.get(key, key)) for key in report.recomputed}
        if changed := [key for key, value in derived.items() if not torch.equal(own[key], value)]:
            faults.append(f"other values of derived buffers {some(changed)}")
    if faults:
        raise UsageError(
            f"the checkpoint does not belong to this model: {'; '.join(faults)}",
            expected="exactly the model's own parameters",
            hint=remedy,
        )
