"""Checkpoints: read without running anything in them, translated to official names, loaded strictly.

A file holds one set of weights or several, such as EMA weights beside plain ones: its entries. It is weighed before it
is unpacked.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from deploycli.models.build import build, family
from deploycli.models.errors import UsageError
from deploycli.models.external import CLASSES, classes_of
from deploycli.models.files import sha256_of
from deploycli.models.memory import available, shortage
from deploycli.models.npy import claims
from deploycli.models.spec import ModelSpec, Weights
from deploycli.models.values import converted, require_dense, shown, some

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from deploycli.models.family import Family


@dataclass(frozen=True)
class LoadReport:
    """What became of each key, by official name.

    Attributes:
        loaded: copied into the model.
        renamed: those of the loaded or recomputed ones that had another name in the file.
        recomputed: derived buffers that the file holds and that equal the model's own.
        resampled: those of the loaded ones that were interpolated for another image size than the file's.
        left_out: in the file, and of the whole of which the model is a part.
        fresh: of the part alone, and as the model was made, for the file is of the whole.
        missing: learned in the model, absent from the file.
        unexpected: in the file, absent from the model.
    """

    loaded: tuple[str, ...]
    renamed: tuple[str, ...]
    recomputed: tuple[str, ...]
    resampled: tuple[str, ...]
    left_out: tuple[str, ...]
    fresh: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def counts(self) -> dict[str, int]:
        """Return the number of keys of each kind that loads; of a part, also of those that do not."""
        of_part = {"left_out": len(self.left_out), "fresh": len(self.fresh)}
        return {
            "loaded": len(self.loaded),
            "renamed": len(self.renamed),
            "recomputed": len(self.recomputed),
            "resampled": len(self.resampled),
            **{what: count for what, count in of_part.items() if count},
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
        entry: which of the file's sets of weights; see :func:`deploycli.models.checkpoint.read_weights`.
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
    part = kind.part(spec.config, bare, sketch.state_dict())
    state, translated = kind.translate(part.state)
    translated |= part.renamed
    fitted = adapt(spec, state, num_classes=num_classes, sketch=sketch)
    kind.check_geometry(fitted.config, state)
    if kind.head in state and state[kind.head].shape[1:] != sketch.get_parameter(kind.head).shape[1:]:
        fitted = spec  # another model's head: refused below, and no reason to make one of its size
    model = sketch if fitted == spec and kind.strange else build(fitted)
    state, resampled = kind.resample(fitted.config, kind.rename(model, fitted.config, state))
    names = dict.fromkeys(translated.values())
    renamed = [translated.get(key, key) for key in part.state] if prefix else list(names)
    in_file = {translated.get(key, key): prefix + key for key in bare if prefix or key in translated}
    remedy = _remedy(fitted, model, state) if kind.strange else ""
    report = load_strictly(
        model,
        state,
        kind,
        renamed=renamed,
        resampled=resampled,
        left_out=part.left_out,
        in_file=in_file,
        remedy=remedy,
    )
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
    left_out: Sequence[str] = (),
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
        left_out: names in the file of what a part does not have.
        in_file: official name -> the name in the file, where it is another.
        remedy: what to try where the keys or shapes are another model's.

    Raises:
        UsageError: a key is missing or unexpected, a shape or a derived buffer differs, or a weight is not finite, or
            of a type that would lose more than digits.
    """
    own = model.state_dict()
    derived = {key for key in own if key.rpartition(".")[2] in kind.derived}
    fresh = {key for key in own if kind.fresh and re.match(kind.fresh, key)}
    if any(key in state for key in fresh):
        fresh = set()  # the file is of such a part, too
    report = LoadReport(
        loaded=tuple(key for key in own if key in state and key not in derived),
        renamed=tuple(dict.fromkeys(renamed)),  # a parameter that was merged from several keys counts once
        recomputed=tuple(key for key in own if key in state and key in derived),
        resampled=tuple(resampled),
        left_out=tuple(left_out),
        fresh=tuple(key for key in own if key in fresh),
        missing=tuple(key for key in own if key not in state and key not in derived and key not in fresh),
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


PREFERRED = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Which entry is read where nothing else was asked for: timm.models.load_state_dict's order, EMA weights first."""

FORMATS = ".safetensors, .pth or .npz"
_DEPTH = 3  # entries are looked for so deep: {"ema": {"module": {...}}}
_TIMES_READ = 3  # reading a file takes no more memory than so many times its size
_BOMB = (1 << 30, 100)  # bytes, ratio: weights do not compress; above both, an archive unpacks to no weights


@dataclass(frozen=True)
class StoredWeights:
    """One set of weights of a file.

    Attributes:
        tensors: dense tensors by the names in the file; they stay mapped to it where its format allows.
        entry: which entry of the file they were, nested ones with dots between; empty where they are the whole file.
        others: the file's other sets of weights.
    """

    tensors: dict[str, Tensor]
    entry: str = ""
    others: tuple[str, ...] = ()


def read_weights(path: Path, entry: str | None = None) -> StoredWeights:
    """Read a set of weights.

    Args:
        path: a ``.safetensors`` file, one that ``torch.save`` wrote, or an ``.npz`` archive.
        entry: which of the file's entries; by default the whole file, or the first of :data:`PREFERRED`, or the only
            one that there is.

    Raises:
        UsageError: there is no such file or entry; the file is damaged, unpacks to far more than it is, or holds
            pickled code; it holds no weights, or several sets with none to prefer; a name is no text, or a value no
            dense tensor.
    """
    if not path.is_file():
        raise UsageError(f"no checkpoint at {path}", expected=f"a {FORMATS} file", hint="check the path")
    content = _content(path)
    if not isinstance(content, Mapping):
        raise UsageError(
            f"{path} holds a {type(content).__name__}, no state dict",
            expected="names and tensors, or a dictionary of such",
            hint="save model.state_dict()",
        )
    entries = _entries(content)
    chosen = _chosen(content, entries, path, entry)
    where = f"{path}, entry {shown(chosen)}," if chosen else str(path)
    return StoredWeights(
        _state_dict(entries[chosen] if chosen else content, where),
        chosen,
        tuple(name for name in entries if name != chosen),
    )


def _content(path: Path) -> object:
    """Read what is in a file, in the format that it has, whatever its name says."""
    try:
        with path.open("rb") as stream:
            start = stream.read(9)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
            _refuse_bomb(path, members)
            if path.suffix == ".npz" or any(member.filename.endswith(".npy") for member in members):
                return _read_npz(path)
            # What is compressed cannot be mapped: torch.load would take the compressed bytes for numbers.
            return _read_torch(path, mmap=all(member.compress_type == zipfile.ZIP_STORED for member in members))
        if path.suffix == ".npz":  # np.load would take it for a pickle
            raise _unreadable(path, ValueError("not a complete zip archive"))
        if path.suffix == ".safetensors" or start[8:] == b"{":
            return load_file(path)
        return _read_torch(path, mmap=False)  # torch.save before 1.6 wrote bare pickles, which cannot be mapped
    except UsageError:
        raise
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign is None:
            raise _unreadable(path, ValueError("not what torch.save writes")) from error
        raise _pickled(path, shown(foreign[1])) from error
    except Exception as error:  # a damaged file makes the readers raise anything: AttributeError, struct.error ...
        if "TorchScript" in str(error):
            raise UsageError(
                f"{path} is a TorchScript program",
                expected=f"the weights alone, a {FORMATS} file",
                hint="torch.save(torch.jit.load(FILE).state_dict(), NEW) where you trust it",
            ) from error
        left = available()
        if shortage(error) is not None and left is not None and _TIMES_READ * path.stat().st_size < left:
            raise UsageError(  # from None: there is memory enough for the file, so that is not what it lacks
                f"{path} cannot be read as a checkpoint: it claims far more numbers than it holds",
                expected=f"a complete {FORMATS} file",
                hint="copy or download it again",
            ) from None
        raise _unreadable(path, error) from error


def _refuse_bomb(path: Path, members: list[zipfile.ZipInfo]) -> None:
    unpacked, packed = sum(member.file_size for member in members), path.stat().st_size
    if unpacked > _BOMB[0] and unpacked > _BOMB[1] * packed:
        raise UsageError(
            f"{path}, {packed:,} bytes, unpacks to {unpacked:,}",
            expected="weights, which hardly compress",
            hint="a file from another place",
        )


def _read_torch(path: Path, *, mmap: bool) -> object:
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.simplefilter("ignore")  # foreign pickles are warned about before they are refused
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _read_npz(path: Path) -> dict[str, Tensor]:
    """Read a NumPy archive, as JAX models are published in."""
    _weigh_npz(path)
    with np.load(path, allow_pickle=False) as archive:
        return {name: _array(path, name, archive) for name in archive.files}


def _weigh_npz(path: Path) -> None:
    """Refuse an array that claims more than the file holds: NumPy would make room for all of it first."""
    with zipfile.ZipFile(path) as archive:
        for claim in claims(archive):
            if claim.claimed > claim.held and not claim.dtype.hasobject:
                raise UsageError(
                    f"{shown(claim.name)} of {path} is {claim.claimed:,} bytes by its shape {list(claim.shape)}, and "
                    f"{claim.held:,} in the file",
                    expected="whole arrays",
                    hint="copy or download it again",
                )


def _array(path: Path, name: str, archive: Mapping[str, Any]) -> Tensor:
    try:
        array = archive[name]
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except (TypeError, ValueError) as error:
        if "allow_pickle" in str(error):
            raise _pickled(path, "an array of objects") from error
        raise UsageError(
            f"{shown(name)} of {path} is no array of numbers ({_first_line(error)})",
            expected="float32, float64 or float16",
            hint="save it as float32",
        ) from error


def _chosen(content: Mapping[Any, Any], entries: Mapping[str, object], path: Path, wanted: str | None) -> str:
    """Return which entry is to be read, empty for the whole content."""
    if wanted is not None and wanted not in entries:
        raise UsageError(
            f"{path} has no weights under {shown(wanted)}",
            expected=f"one of {', '.join(map(shown, entries))}" if entries else "a file with several sets of weights",
            hint=f"--weights-entry {shown(next(iter(entries)))}" if entries else "leave out --weights-entry",
        )
    preferred = next((name for name in PREFERRED if name in entries), None)
    if (chosen := wanted or preferred) is not None:
        return chosen
    tensors = [isinstance(value, Tensor) for value in content.values()]
    if all(tensors) or (any(tensors) and not entries):
        return ""
    if len(entries) == 1:
        return next(iter(entries))
    if entries:
        raise UsageError(
            f"{path} holds several sets of weights {some(list(entries))}",
            expected=f"one, or one called {' or '.join(PREFERRED)}",
            hint=f"--weights-entry {shown(next(iter(entries)))}",
        )
    raise UsageError(
        f"{path} holds no state dict; its entries are {some(list(content))}",
        expected=f"names and tensors, at the top or under {', '.join(PREFERRED)} or another name",
        hint="save model.state_dict()",
    )


def _entries(content: Mapping[Any, Any]) -> dict[str, Mapping[Any, Any]]:
    """Find the sets of weights that lie under names in what a training script saved.

    What has a preferred name is one if any of its values is a tensor, or if it is empty, so that what is wrong with it
    is said. Optimizers hold tensors, too, but under numbers.
    """
    found: dict[str, Mapping[Any, Any]] = {}
    seen: set[int] = set()  # a pickle may hold one dictionary a million times

    def look(holder: Mapping[Any, Any], place: tuple[str, ...]) -> None:
        for name, value in holder.items():
            if not isinstance(name, str) or not isinstance(value, Mapping) or id(value) in seen:
                continue
            seen.add(id(value))
            tensors = [isinstance(item, Tensor) for item in value.values()]
            named = not place and name in PREFERRED
            if (any(tensors) or not tensors) if named else (any(tensors) and all(tensors)):
                found[".".join((*place, name))] = value
            elif len(place) + 1 < _DEPTH:
                look(value, (*place, name))

    look(content, ())
    return found


def _state_dict(found: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    """Check every name and every value."""
    if not found:
        raise UsageError(f"{where} holds no state dict: it has no keys", expected="names and tensors")
    for key, value in found.items():
        if not isinstance(key, str) or not key:
            raise UsageError(
                f"{where} has the key {shown(key)}" + ("" if key == "" else f", of type {type(key).__name__}"),
                expected="names of parameters",
                hint="save model.state_dict()",
            )
        if not isinstance(value, Tensor):
            raise UsageError(
                f"{where} holds no tensor under {shown(key)}, but {type(value).__name__}",
                expected="tensors only",
                hint="save model.state_dict()",
            )
        require_dense(key, value)
    return dict(found)


def _pickled(path: Path, what: str) -> UsageError:
    return UsageError(
        f"{path} holds pickled code or objects ({what}), which would have to be run to be read",
        expected="tensors only",
        hint="where you trust the file, save its state dict alone, as safetensors or with torch.save",
    )


def _unreadable(path: Path, error: Exception) -> UsageError:
    return UsageError(
        f"{path} cannot be read as a checkpoint ({_first_line(error)})",
        expected=f"a complete {FORMATS} file",
        hint="copy or download it again",
    )


def _first_line(error: Exception) -> str:
    return shown(str(error).strip().partition("\n")[0] or type(error).__name__)
