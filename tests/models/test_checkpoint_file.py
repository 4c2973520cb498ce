"""What a checkpoint file may hold: names, tensors, entries, sizes; all else is a sentence."""

from __future__ import annotations

import argparse
import io
import json
import resource
import struct
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from deploycli.models.checkpoint_file import PREFERRED, StoredWeights, read_weights
from deploycli.models.errors import UsageError
from deploycli.models.memory import shortage

if TYPE_CHECKING:
    from collections.abc import Callable

ONE = torch.ones(1)


def saved(content: object, tmp_path: Path, name: str = "weights.pth", **options: Any) -> Path:
    path = tmp_path / name
    torch.save(content, path, **options)
    return path


def read(content: object, tmp_path: Path, entry: str | None = None) -> StoredWeights:
    return read_weights(saved(content, tmp_path), entry)


def refusal(path: Path, entry: str | None = None) -> str:
    with pytest.raises(UsageError) as failure:
        read_weights(path, entry)
    return str(failure.value)


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch will not make such tensors for ever; files hold them
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def nested(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the interface is a prototype
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


def compressed() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the layout is in beta
        return torch.eye(3).to_sparse_csr()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: {0: ONE}, "has the key 0, of type int"),
        (lambda: {"good": ONE, b"x": ONE}, "has the key b'x', of type bytes"),
        (lambda: {"": ONE}, "has the key ''"),
        (lambda: {}, "holds no state dict: it has no keys"),
        (lambda: {"state_dict": {}}, "entry state_dict, holds no state dict: it has no keys"),
        (lambda: {"model": {"good": ONE, 3: ONE}}, "entry model, has the key 3, of type int"),
        (lambda: {"good": ONE, "epoch": 3}, "holds no tensor under epoch, but int"),
        (lambda: {"a\x1b[31m": 3, "good": ONE}, r"holds no tensor under 'a\x1b[31m', but int"),
        (lambda: [ONE], "holds a list, no state dict"),
        (lambda: ONE, "holds a Tensor, no state dict"),
        (lambda: {"epoch": 3, "arch": "x"}, "holds no state dict; its entries are (2): epoch, arch"),
        (lambda: {"w": torch.eye(3).to_sparse()}, "w is a sparse tensor"),
        (lambda: {"w": compressed()}, "w is a sparse tensor"),
        (lambda: {"w": torch.ones(3, device="meta")}, "w is a meta tensor"),
        (lambda: {"w": quantized()}, "w is a quantized tensor (qint8)"),
        (lambda: {"w": nested(torch.strided)}, "w is a nested tensor"),
        (lambda: {"w": nested(torch.jagged)}, "w is a NestedTensor"),
        (lambda: {"w": ONE.expand(10**12)}, "w is 4,000,000,000,000 bytes by its shape [1000000000000], and 4 in the"),
        (lambda: {"state_dict": {"w": ONE}, "where": Path()}, "pickled code or objects (pathlib."),
    ],
)
def test_what_is_no_state_dict_is_told_with_the_key(make: Callable[[], object], message: str, tmp_path: Path) -> None:
    assert message in refusal(saved(make(), tmp_path))


def test_the_arguments_of_a_training_script_are_no_obstacle(tmp_path: Path) -> None:
    stored = read({"state_dict": {"w": ONE}, "args": argparse.Namespace(lr=0.1)}, tmp_path)
    assert stored == StoredWeights({"w": ONE}, "state_dict", ())
    with pytest.raises(Exception, match=r"argparse\.Namespace"):  # allowed for this one file, and no longer
        torch.load(tmp_path / "weights.pth", weights_only=True)


def test_entries_are_read_in_timms_order(tmp_path: Path) -> None:
    content: dict[str, object] = {"epoch": 3, **{name: {"w": torch.full((1,), i)} for i, name in enumerate(PREFERRED)}}
    for i, name in enumerate(PREFERRED):
        stored = read(content, tmp_path)
        assert (stored.entry, stored.tensors["w"].item()) == (name, i)
        assert set(stored.others) == set(PREFERRED[i + 1 :])
        content[name] = None  # as timm saves it where there is no average


@pytest.mark.parametrize(
    ("content", "entry"),
    [
        ({"net": {"w": ONE}, "acc": 0.9}, "net"),
        ({"ema": {"module": {"w": ONE}}, "optimizer": {"state": {0: {"exp_avg": ONE}}}}, "ema.module"),
        ({"net": {"w": ONE}, "rng_state": ONE}, "net"),
        ({"w": nn.Parameter(ONE)}, ""),
    ],
)
def test_the_only_set_of_weights_is_found(content: object, entry: str, tmp_path: Path) -> None:
    stored = read(content, tmp_path)
    assert (stored.entry, list(stored.tensors), stored.others) == (entry, ["w"], ())


def test_an_entry_is_chosen_by_name(tmp_path: Path) -> None:
    path = saved({"student": {"w": ONE}, "teacher": {"w": ONE * 2}, "ema": {"module": {"w": ONE * 3}}}, tmp_path)
    assert read_weights(path, "teacher").tensors["w"].item() == 2
    assert read_weights(path, "ema.module").tensors["w"].item() == 3
    message = refusal(path)
    assert "several sets of weights (3): student, teacher, ema.module" in message
    assert "--weights-entry student" in message
    assert "no weights under x\n  expected: one of student, teacher, ema.module" in refusal(path, "x")
    assert "leave out --weights-entry" in refusal(saved({"w": ONE}, tmp_path), "model")


def test_a_dictionary_that_is_there_a_million_times_is_looked_at_once(tmp_path: Path) -> None:
    inner: dict[str, object] = {str(i): {"a": 1} for i in range(1000)}
    middle = {str(i): inner for i in range(1000)}
    path = saved({str(i): middle for i in range(1000)}, tmp_path)
    assert "holds no state dict" in refusal(path)


def safetensors_file(tmp_path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = json.dumps(header).encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


TERA = 1 << 40


def tensor(shape: list[int], size: int, dtype: str = "F32") -> dict[str, object]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}


def test_safetensors_that_claim_too_much_or_nothing(tmp_path: Path) -> None:
    assert "it has no keys" in refusal(safetensors_file(tmp_path, {}))
    for path in (
        safetensors_file(tmp_path, {}, length=TERA),
        safetensors_file(tmp_path, tensor([TERA], 4 * TERA), bytes(16)),
        safetensors_file(tmp_path, tensor([4], 4, "X9"), bytes(4)),
    ):
        assert "cannot be read as a checkpoint" in refusal(path)


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    path = safetensors_file(tmp_path, tensor([1], 4), struct.pack("<f", 3))
    assert read_weights(path.rename(tmp_path / "weights.bin")).tensors["w"].item() == 3
    np.savez(tmp_path / "arrays.npz", w=np.arange(3, dtype=">f4"))
    stored = read_weights((tmp_path / "arrays.npz").rename(tmp_path / "arrays.pth"))
    assert stored.tensors["w"].tolist() == [0, 1, 2]


def repacked(path: Path, kind: int, change: Callable[[bytes], bytes] = bytes) -> Path:
    """Write an archive anew: compressed or not, with another pickle."""
    new = path.with_name("repacked.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(new, "w", kind) as archive:
        for member in old.infolist():
            content = old.read(member)
            archive.writestr(member.filename, change(content) if member.filename.endswith("data.pkl") else content)
    return new


def test_an_archive_that_was_compressed_holds_the_same_numbers(tmp_path: Path) -> None:
    path = repacked(saved({"w": torch.arange(1000.0)}, tmp_path), zipfile.ZIP_DEFLATED)
    assert torch.equal(read_weights(path).tensors["w"], torch.arange(1000.0))


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("count", [10**9, 10**12])
def test_a_storage_that_claims_more_than_the_file_holds(kind: int, count: int, tmp_path: Path) -> None:
    claim = b"\x8a\x08" + struct.pack("<q", count)
    path = saved({"w": torch.arange(1000.0)}, tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "cannot be read" in refusal(repacked(path, kind, lambda pickle: pickle.replace(b"M\xe8\x03", claim)))
    old = saved({"w": torch.arange(1000.0)}, tmp_path, _use_new_zipfile_serialization=False)
    old.write_bytes(old.read_bytes().replace(b"M\xe8\x03", claim))
    assert "cannot be read" in refusal(old)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (count,)})
    with zipfile.ZipFile(tmp_path / "weights.npz", "w") as archive:
        archive.writestr("w.npy", header.getvalue() + bytes(16))
    assert "bytes by its shape" in refusal(tmp_path / "weights.npz")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize(("zipped", "count"), [(True, 2**61), (False, 10**12)])
def test_a_claim_is_no_lack_of_memory(zipped: bool, count: int, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"w": torch.arange(1000.0)}, path, _use_new_zipfile_serialization=zipped)
    claim = b"\x8a\x08" + struct.pack("<q", count)
    if zipped:
        path = repacked(path, zipfile.ZIP_STORED, lambda pickle: pickle.replace(b"M\xe8\x03", claim))
    else:
        path.write_bytes(path.read_bytes().replace(b"M\xe8\x03", claim))
    with pytest.raises(UsageError, match="claims far more numbers than it holds") as refused:
        read_weights(path)
    assert shortage(refused.value) is None


@pytest.mark.parametrize("name", ["w.npy", "archive/data.pkl"])
def test_an_archive_that_unpacks_to_far_more_than_it_is(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, bytes(1000))
    size = struct.pack("<I", 1000)
    path.write_bytes(path.read_bytes().replace(size, struct.pack("<I", 4_000_000_000)))  # what the archive says of it
    assert "unpacks to 4,000,000,000" in refusal(path)


@pytest.mark.parametrize("array", [np.zeros(2, "V2"), np.array(["text"]), np.zeros(2, [("a", "f4"), ("b", "i4")])])
def test_arrays_that_are_no_numbers(array: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", good=np.ones(1), bad=array)
    assert "bad of " in (message := refusal(tmp_path / "weights.npz"))
    assert "is no array of numbers" in message


def test_a_torchscript_program_says_what_to_do(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch deprecates it; people have such files
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "weights.pt")
    assert "is a TorchScript program" in refusal(tmp_path / "weights.pt")
