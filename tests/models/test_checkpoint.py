"""What a checkpoint may look like, and what is refused."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import resource
import struct
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from deploycli.models.build import build, family
from deploycli.models.checkpoint import PREFERRED, Loaded, StoredWeights, load, read_weights
from deploycli.models.errors import UsageError
from deploycli.models.files import sha256_of
from deploycli.models.memory import shortage
from deploycli.models.registry import resolve
from deploycli.models.swin import translate
from tests.models.swins import DERIVED, golden_state, tiny_spec, tiny_swin, to_timm_names

if TYPE_CHECKING:
    from collections.abc import Callable


State = dict[str, torch.Tensor]


@pytest.fixture
def official() -> State:
    """The learned weights and the derived buffers, as the authors' files hold them."""
    return {key: value.clone() for key, value in tiny_swin().state_dict().items()}


def learned(state: State) -> State:
    return {key: value for key, value in state.items() if not key.endswith(DERIVED)}


def assert_same_weights(loaded: Loaded, state: State) -> None:
    own = loaded.model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in learned(state).items())
    assert not loaded.model.training


def refusal(path: Path, *, num_classes: int | None = None, **changes: Any) -> str:
    with pytest.raises(UsageError) as failure:
        load(tiny_spec(**changes), path, num_classes=num_classes)
    assert failure.value.exit_code == 2
    return str(failure.value)


def saved(content: object, tmp_path: Path) -> Path:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model_ema": state},
        lambda state: state,
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    ],
    ids=["model", "state_dict", "model_ema", "bare", "module.", "compiled"],
)
def test_loads_what_training_scripts_save(wrap: Any, official: State, tmp_path: Path) -> None:
    path = saved(wrap(official), tmp_path)
    loaded = load(tiny_spec(), path)
    assert_same_weights(loaded, official)
    counts = loaded.report.counts()
    assert counts["loaded"] == len(learned(official))
    assert counts["recomputed"] == len(official) - len(learned(official))
    assert counts["renamed"] in (0, len(official))
    assert loaded.weights.report == counts
    assert (loaded.weights.source, loaded.weights.path) == ("checkpoint", str(path))
    assert loaded.weights.sha256 == sha256_of(path)


def test_loads_timms_names_from_safetensors(official: State, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in to_timm_names(official).items()}, path)
    loaded = load(tiny_spec(), path, source="pretrained", origin="timm/x@abc/model.safetensors")
    assert_same_weights(loaded, official)
    assert set(loaded.report.renamed) == {key for key in official if "downsample" in key or key.startswith("head.")}
    assert loaded.report.recomputed == ()
    assert (loaded.weights.source, loaded.weights.path) == ("pretrained", "timm/x@abc/model.safetensors")


def test_loads_the_format_of_old_pytorch(official: State, tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"model": official}, path, _use_new_zipfile_serialization=False)
    assert_same_weights(load(tiny_spec(), path), official)


def test_half_precision_becomes_single(official: State, tmp_path: Path) -> None:
    halves = {key: value.half() if value.is_floating_point() else value for key, value in official.items()}
    loaded = load(tiny_spec(), saved({"model": halves}, tmp_path))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert_same_weights(loaded, {key: value.float() for key, value in learned(halves).items()})


def test_the_file_is_mapped_and_not_kept(official: State, tmp_path: Path) -> None:
    path = saved({"model": official}, tmp_path)
    loaded = load(tiny_spec(), path)
    storages = {p.untyped_storage().data_ptr() for p in loaded.model.parameters()}
    assert storages.isdisjoint(value.untyped_storage().data_ptr() for value in read_weights(path).tensors.values())
    path.write_bytes(b"\0" * path.stat().st_size)
    assert_same_weights(loaded, official)


def test_the_number_of_classes_is_the_files(tmp_path: Path) -> None:
    path = saved(golden_state(tiny_swin(num_classes=7)), tmp_path)
    loaded = load(tiny_spec(num_classes=5), path)
    assert loaded.spec.config["num_classes"] == 7
    assert loaded.model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert load(tiny_spec(), path, num_classes=7).spec == loaded.spec
    assert "head has 7 classes" in refusal(path, num_classes=5)


@pytest.mark.parametrize("keep_derived", [True, False])
def test_another_window_is_refused_with_the_one_it_needs(keep_derived: bool, tmp_path: Path) -> None:
    state = tiny_swin(window_size=4, img_size=(32, 32)).state_dict()
    message = refusal(saved(state if keep_derived else learned(state), tmp_path))
    assert "made for a window of 4" in message
    assert "--window-size 4" in message
    assert ("32x32" in message) == keep_derived  # the last map is as large as the window: only a mask tells


def test_another_image_size_is_refused_with_the_one_it_needs(tmp_path: Path) -> None:
    with_masks = saved(tiny_swin(img_size=(128, 128)).state_dict(), tmp_path)
    assert "images of 128x128" in refusal(with_masks)
    shrunk = saved(golden_state(tiny_swin(img_size=(32, 32))), tmp_path)
    assert "--img-size 32" in refusal(shrunk)
    embedded = saved(golden_state(tiny_swin(img_size=(128, 128), ape=True)), tmp_path)
    assert "images of 128x128" in refusal(embedded, ape=True)
    oblong = saved(tiny_swin(img_size=(64, 128)).state_dict(), tmp_path)
    assert "images of 2048 patches" in refusal(oblong)


def test_swin_b_at_384_is_not_swin_b_at_224(tmp_path: Path) -> None:
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    state = {table: torch.zeros(23**2, 4), "layers.0.blocks.1.attn_mask": torch.zeros(64, 144, 144)}
    with pytest.raises(UsageError, match="window of 12 and images of 384x384"):
        load(resolve("swin_b").spec, saved(state, tmp_path))


def test_missing_and_unexpected_keys_are_named_in_one_message(official: State, tmp_path: Path) -> None:
    del official["norm.weight"], official["layers.0.blocks.0.mlp.fc1.bias"]
    official["extra.weight"] = torch.zeros(1)
    message = refusal(saved(official, tmp_path))
    assert "missing (2): layers.0.blocks.0.mlp.fc1.bias, norm.weight" in message
    assert "unexpected (1): extra.weight" in message


def test_a_headless_checkpoint_says_so(official: State, tmp_path: Path) -> None:
    del official["head.weight"], official["head.bias"]
    assert "missing (2): head.weight, head.bias" in refusal(saved(official, tmp_path))


def test_another_model_is_refused_by_its_shapes(tmp_path: Path) -> None:
    message = refusal(saved(tiny_swin(embed_dim=16).state_dict(), tmp_path))
    assert "patch_embed.proj.weight [16, 3, 2, 2] instead of [8, 3, 2, 2]" in message


def test_a_name_that_is_there_twice_is_not_overwritten(official: State, tmp_path: Path) -> None:
    official["head.fc.weight"] = torch.zeros_like(official["head.weight"])
    assert "unexpected (1): head.fc.weight" in refusal(saved(official, tmp_path))


def test_derived_buffers_must_be_the_models_own(official: State, tmp_path: Path) -> None:
    official["layers.0.blocks.1.attn_mask"][0, 0, 1] = -50
    assert "derived buffers (1): layers.0.blocks.1.attn_mask" in refusal(saved(official, tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, official: State, tmp_path: Path) -> None:
    official["layers.1.blocks.0.mlp.fc2.weight"][3, 4] = value
    assert "layers.1.blocks.0.mlp.fc2.weight holds NaN or infinity" in refusal(saved(official, tmp_path))


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Exploit:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    in_a_zip = saved({"model": Exploit()}, tmp_path)
    assert "pickled code or objects (posix.mkdir)" in refusal(in_a_zip)
    bare = tmp_path / "bare.pth"
    bare.write_bytes(pickle.dumps({"model": Exploit()}, protocol=2))
    assert "pickled code" in refusal(bare)
    bare.write_bytes(pickle.dumps({"model": Exploit()}))
    assert "cannot be read as a checkpoint (not what torch.save writes)" in refusal(bare)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_truncated_files_are_refused(suffix: str, share: float, official: State, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": official}, path)
    else:
        save_file({key: value.contiguous() for key, value in official.items()}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert f"{path} cannot be read as a checkpoint" in refusal(path)


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    assert "no checkpoint at" in refusal(tmp_path / "absent.pth")
    assert "no checkpoint at" in refusal(tmp_path)
    text = tmp_path / "text.pth"
    text.write_text("hello")
    assert "cannot be read" in refusal(text)
    for content in ({"epoch": 3}, [1, 2], {"model": {}}, torch.zeros(3)):
        assert "no state dict" in refusal(saved(content, tmp_path))


def test_timms_older_releases_renamed_only_the_head() -> None:
    state = {key: torch.zeros(1) for key in ("layers.0.downsample.norm.weight", "head.fc.bias")}
    translated, renamed = translate(state)
    assert set(translated) == {"layers.0.downsample.norm.weight", "head.bias"}
    assert renamed == {"head.fc.bias": "head.bias"}


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown model family 'vgg'"):
        family("vgg")


def test_load_gives_what_build_gives_with_those_weights(official: State, tmp_path: Path) -> None:
    model = build(tiny_spec(), seed=3)
    model.load_state_dict(official)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(load(tiny_spec(), saved(official, tmp_path)).model(images), model(images))


ONE = torch.ones(1)


def file_of(content: object, tmp_path: Path, name: str = "weights.pth", **options: Any) -> Path:
    path = tmp_path / name
    torch.save(content, path, **options)
    return path


def read(content: object, tmp_path: Path, entry: str | None = None) -> StoredWeights:
    return read_weights(file_of(content, tmp_path), entry)


def unreadable(path: Path, entry: str | None = None) -> str:
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
    assert message in unreadable(file_of(make(), tmp_path))


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
    path = file_of({"student": {"w": ONE}, "teacher": {"w": ONE * 2}, "ema": {"module": {"w": ONE * 3}}}, tmp_path)
    assert read_weights(path, "teacher").tensors["w"].item() == 2
    assert read_weights(path, "ema.module").tensors["w"].item() == 3
    message = unreadable(path)
    assert "several sets of weights (3): student, teacher, ema.module" in message
    assert "--weights-entry student" in message
    assert "no weights under x\n  expected: one of student, teacher, ema.module" in unreadable(path, "x")
    assert "leave out --weights-entry" in unreadable(file_of({"w": ONE}, tmp_path), "model")


def test_a_dictionary_that_is_there_a_million_times_is_looked_at_once(tmp_path: Path) -> None:
    inner: dict[str, object] = {str(i): {"a": 1} for i in range(1000)}
    middle = {str(i): inner for i in range(1000)}
    path = file_of({str(i): middle for i in range(1000)}, tmp_path)
    assert "holds no state dict" in unreadable(path)


def safetensors_file(tmp_path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = json.dumps(header).encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


TERA = 1 << 40


def tensor(shape: list[int], size: int, dtype: str = "F32") -> dict[str, object]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}


def test_safetensors_that_claim_too_much_or_nothing(tmp_path: Path) -> None:
    assert "it has no keys" in unreadable(safetensors_file(tmp_path, {}))
    for path in (
        safetensors_file(tmp_path, {}, length=TERA),
        safetensors_file(tmp_path, tensor([TERA], 4 * TERA), bytes(16)),
        safetensors_file(tmp_path, tensor([4], 4, "X9"), bytes(4)),
    ):
        assert "cannot be read as a checkpoint" in unreadable(path)


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
    path = repacked(file_of({"w": torch.arange(1000.0)}, tmp_path), zipfile.ZIP_DEFLATED)
    assert torch.equal(read_weights(path).tensors["w"], torch.arange(1000.0))


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("count", [10**9, 10**12])
def test_a_storage_that_claims_more_than_the_file_holds(kind: int, count: int, tmp_path: Path) -> None:
    claim = b"\x8a\x08" + struct.pack("<q", count)
    path = file_of({"w": torch.arange(1000.0)}, tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "cannot be read" in unreadable(repacked(path, kind, lambda pickle: pickle.replace(b"M\xe8\x03", claim)))
    old = file_of({"w": torch.arange(1000.0)}, tmp_path, _use_new_zipfile_serialization=False)
    old.write_bytes(old.read_bytes().replace(b"M\xe8\x03", claim))
    assert "cannot be read" in unreadable(old)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (count,)})
    with zipfile.ZipFile(tmp_path / "weights.npz", "w") as archive:
        archive.writestr("w.npy", header.getvalue() + bytes(16))
    assert "bytes by its shape" in unreadable(tmp_path / "weights.npz")
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
    assert "unpacks to 4,000,000,000" in unreadable(path)


@pytest.mark.parametrize("array", [np.zeros(2, "V2"), np.array(["text"]), np.zeros(2, [("a", "f4"), ("b", "i4")])])
def test_arrays_that_are_no_numbers(array: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", good=np.ones(1), bad=array)
    assert "bad of " in (message := unreadable(tmp_path / "weights.npz"))
    assert "is no array of numbers" in message


def test_a_torchscript_program_says_what_to_do(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch deprecates it; people have such files
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "weights.pt")
    assert "is a TorchScript program" in unreadable(tmp_path / "weights.pt")
