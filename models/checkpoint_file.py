"""Checkpoint files: read without running anything in them, weighed before they are unpacked.

A file holds one set of weights or several, such as EMA weights beside plain ones: its entries.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from deploycli.models.errors import UsageError
from deploycli.models.memory import available, shortage
from deploycli.models.npy import claims
from deploycli.models.values import require_dense, shown, some

if TYPE_CHECKING:
    from pathlib import Path

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
