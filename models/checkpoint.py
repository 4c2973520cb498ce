"""Checkpoints: read without running anything in them, translated to official names, loaded strictly."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.build import build
from models.errors import UsageError
from models.families import Family, family
from models.files import sha256_of
from models.spec import ModelSpec, Weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

CONTAINERS = ("model", "state_dict", "model_ema", "state_dict_ema")  # where training scripts put the weights, in order
PREFIXES = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before each name
FORMATS = ".safetensors, .pth or .npz"
NAMED_IN_A_MESSAGE = 4


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
    spec: ModelSpec, path: Path, *, num_classes: int | None = None, source: str = "checkpoint", origin: str = ""
) -> Loaded:
    """Build the model and load a checkpoint into it. Peak memory is about twice the weights.

    Args:
        spec: the model; its ``num_classes`` gives way to the checkpoint's.
        path: a ``.safetensors`` file, one that ``torch.save`` wrote, or an ``.npz`` archive of JAX, by any names that
            the family translates.
        num_classes: what the user asked for, None if nothing; an error if the checkpoint has another head.
        source: ``checkpoint`` or ``pretrained``, for the manifest.
        origin: the file's name in the manifest; by default the path as given.

    Raises:
        UsageError: the file cannot be read or holds pickled code; its keys, shapes or derived buffers do not belong to
            the model; it was made for another head, window or image size and cannot be adapted; or a weight is not
            finite.
    """
    kind = family(spec.family)
    state, unprefixed = _strip_prefixes(read_state(path))
    state, translated = kind.translate(state)
    spec = adapt(spec, state, num_classes=num_classes)
    kind.check_geometry(spec.config, state)
    model = build(spec)
    state, resampled = kind.resample(spec.config, state)
    renamed = [translated.get(key, key) for key in unprefixed] + list(translated.values())
    report = load_strictly(model, state, kind, renamed=renamed, resampled=resampled)
    weights = Weights(source, path=origin or str(path), sha256=sha256_of(path), report=report.counts())
    return Loaded(model, spec, weights, report)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint by the names in the file; they stay mapped to it where its format allows.

    Raises:
        UsageError: there is no such file, it is damaged, it holds pickled code, or it holds no weights.
    """
    if not path.is_file():
        raise UsageError(f"no checkpoint at {path}", expected=f"a {FORMATS} file", hint="check the path")
    if path.suffix == ".npz":
        return _state_dict(_read_npz(path), path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error
    try:
        mappable = zipfile.is_zipfile(path)  # torch.save before 1.6 wrote bare pickles, which cannot be mapped
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # foreign pickles are warned about before they are refused
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign is None:
            raise _unreadable(path, ValueError("not what torch.save writes")) from error
        raise _pickled(path, foreign[1]) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error
    return _state_dict(content, path)


def adapt(spec: ModelSpec, state: Mapping[str, Tensor], *, num_classes: int | None = None) -> ModelSpec:
    """Return the spec with the number of classes that the checkpoint's head has.

    Args:
        spec: the model.
        state: the checkpoint by official names.
        num_classes: what the user asked for, None if nothing.

    Raises:
        UsageError: the user asked for another number.
    """
    head = state.get(family(spec.family).head)
    if head is None:
        return spec  # reported as missing when it is loaded
    classes = head.shape[0]
    if num_classes not in (None, classes):
        raise UsageError(
            f"the checkpoint's head has {classes} classes", expected=f"{num_classes}", hint=f"--num-classes {classes}"
        )
    return replace(spec, config={**spec.config, "num_classes": classes})


def load_strictly(
    model: nn.Module,
    state: Mapping[str, Tensor],
    kind: Family,
    *,
    renamed: Sequence[str] = (),
    resampled: Sequence[str] = (),
) -> LoadReport:
    """Copy a checkpoint into a model, casting to the model's types, and account for every key.

    Derived buffers are not copied; those in the file must equal the model's own.

    Args:
        model: changed in place.
        state: the checkpoint by official names.
        kind: the model's family.
        renamed: official names of the keys that had another name in the file.
        resampled: official names of the keys that were interpolated for another image size.

    Raises:
        UsageError: a key is missing or unexpected, a shape or a derived buffer differs, or a weight is not finite.
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
    _refuse_mismatch(report, own, state)
    with torch.no_grad():
        for key in report.loaded:
            if not state[key].isfinite().all():
                raise UsageError(f"{key} holds NaN or infinity", expected="finite weights", hint="another checkpoint")
            own[key].copy_(state[key])
    return report


def _read_npz(path: Path) -> dict[str, Tensor]:
    """Read a NumPy archive, as JAX models are published in."""
    if not zipfile.is_zipfile(path):  # np.load would take it for a pickle
        raise _unreadable(path, ValueError("not a complete zip archive"))
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except (ValueError, TypeError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error):
            raise _pickled(path, "an array of objects") from error
        raise _unreadable(path, error) from error


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    """Find the weights in what a training script saved."""
    for name in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values()):
        return dict(content)
    raise UsageError(
        f"{path} holds no state dict",
        expected=f"names and tensors, at the top or under {', '.join(CONTAINERS)}",
        hint="save model.state_dict()",
    )


def _strip_prefixes(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Remove wrappers' prefixes that every key has; return the state and the keys that were renamed."""
    bare = dict(state)
    stripped = False
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in bare)), None):
        bare = {key.removeprefix(prefix): value for key, value in bare.items()}
        stripped = True
    return bare, list(bare) if stripped else []


def _refuse_mismatch(report: LoadReport, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    faults = []
    if report.missing:
        faults.append(f"missing {_some(report.missing)}")
    if report.unexpected:
        faults.append(f"unexpected {_some(report.unexpected)}")
    reshaped = [key for key in own if key in state and own[key].shape != state[key].shape]
    if reshaped:
        faults.append(
            "other shapes "
            + _some([f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}" for key in reshaped])
        )
    else:
        changed = [key for key in report.recomputed if not torch.equal(own[key], state[key].to(own[key].dtype))]
        if changed:
            faults.append(f"other values of derived buffers {_some(changed)}")
    if faults:
        raise UsageError(
            f"the checkpoint does not belong to this model: {'; '.join(faults)}",
            expected="exactly the model's own parameters",
            hint="another model name; `deploycli list` shows them",
        )


def _some(keys: Sequence[str]) -> str:
    """Name the first few keys, and say how many there are."""
    more = len(keys) - NAMED_IN_A_MESSAGE
    return f"({len(keys)}): {', '.join(keys[:NAMED_IN_A_MESSAGE])}{', ...' if more > 0 else ''}"


def _pickled(path: Path, what: str) -> UsageError:
    return UsageError(
        f"{path} holds pickled code or objects ({what}), which would have to be run to be read",
        expected="tensors only",
        hint="where you trust the file, save its state dict alone, as safetensors or with torch.save",
    )


def _unreadable(path: Path, error: Exception) -> UsageError:
    first_line = str(error).strip().partition("\n")[0][:200]
    return UsageError(
        f"{path} cannot be read as a checkpoint ({first_line or type(error).__name__})",
        expected=f"a complete {FORMATS} file",
        hint="copy or download it again",
    )
