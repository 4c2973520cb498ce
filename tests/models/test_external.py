"""Models from elsewhere: how they are named, made, described, and refused."""

import collections
import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import nn

from deploycli.exporters.export import ExportOptions, export
from deploycli.models import codec
from deploycli.models.build import build
from deploycli.models.checkpoint import load
from deploycli.models.describe import _Processor, describe, own_checkpoint, with_classes
from deploycli.models.errors import DeployError, EnvironmentUnsuitable, IntegrityError, UsageError
from deploycli.models.external import classes_of, make
from deploycli.models.hub import fetch
from deploycli.models.outputs import flatten
from deploycli.models.registry import variants
from deploycli.models.sources import Source, parse_source
from deploycli.models.spec import TensorSpec
from deploycli.models.variants import HubFile
from tests.hub_server import COMMIT, Hub, serving
from tests.peers import import_timm, import_transformers

FACTORIES = """
import collections
import torch
from torch import nn

def net(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def raises():
    raise ValueError("no luck")

def text():
    return "not a module"

class Pair(nn.Module):
    def forward(self, left, right):
        return {"sum": left + right, "both": (left, None, right * 2)}

def wrapped():
    return nn.Sequential(collections.OrderedDict(module=nn.Linear(3, 2)))

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a module of the user's."""
    (tmp_path / "strangers.py").write_text(FACTORIES)
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("strangers", "needs_more"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "source", "name"),
    [
        ("swin_t", None, ""),
        ("timm:vit_base_patch16_224.augreg_in21k", Source("timm", "vit_base_patch16_224.augreg_in21k"), None),
        ("torchvision:swin_t", Source("torchvision", "swin_t"), "swin_t"),
        ("hf:microsoft/swin-tiny@abc", Source("hf", "microsoft/swin-tiny@abc"), "swin-tiny_abc"),
        ("hf:/a/folder/", Source("hf", "/a/folder/"), "folder"),
        ("my.models:build", Source("factory", "my.models:build"), "my.models.build"),
        ("dir/file.py:build", Source("factory", "dir/file.py:build"), "file.build"),
        ("dir/.../a b.py:Class.make", Source("factory", "dir/.../a b.py:Class.make"), "a_b.Class.make"),
        ("dir/-.py:_", Source("factory", "dir/-.py:_"), "factory.factory"),
    ],
)
def test_names_are_read(text: str, source: Source | None, name: str | None) -> None:
    assert parse_source(text) == source
    if source is not None:
        assert source.name == (name if name is not None else source.target)


def test_no_registered_name_can_be_a_factorys() -> None:
    assert [variant.name for variant in variants() if "." in variant.name] == []


def test_outputs_are_flattened_with_clear_names() -> None:
    @dataclasses.dataclass
    class Detection:
        boxes: torch.Tensor
        features: list[torch.Tensor]
        nothing: None = None

    a, b, c = torch.zeros(2, 3), torch.ones(2, 4, 4), torch.ones(2)
    point = collections.namedtuple("point", "x y")
    assert list(flatten(a)) == ["logits"]
    assert list(flatten(b)) == ["output"]
    assert list(flatten((a, b))) == ["output_0", "output_1"]
    assert list(flatten({"logits": a, "aux": (b, c)})) == ["logits", "aux_0", "aux_1"]
    assert list(flatten(Detection(a, [b, c]))) == ["boxes", "features_0", "features_1"]
    assert flatten(point(a, b)) == {"x": a, "y": b}
    with pytest.raises(UsageError, match="returns str as kind"):
        flatten({"logits": a, "kind": "cat"})


def test_a_factory_is_found_from_the_working_folder(folder: Path) -> None:
    for target in ("strangers:net", f"{folder / 'strangers.py'}:net"):
        variant = describe(Source("factory", target), {"width": 7}, img_size=(16, 20))
        assert variant.spec.inputs == (TensorSpec("images", (3, 16, 20)),)
        assert variant.spec.outputs == ("logits",)
        assert build(variant.spec)(torch.zeros(2, 3, 16, 20)).shape == (2, 7)


def test_several_inputs_and_outputs(folder: Path) -> None:
    inputs = (TensorSpec("left", (3,)), TensorSpec("right", (3,)))
    variant = describe(Source("factory", "strangers:Pair"), {}, inputs=inputs)
    assert variant.spec.outputs == ("sum", "both_0", "both_2")
    assert variant.preprocessing is None


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere:net", "no module 'nowhere'"),
        ("needs_more:net", "no module 'a_package_that_is_not_there', which needs_more imports"),
        ("strangers:absent", "no function 'absent'"),
        ("strangers:number", "no function 'number'"),
        ("strangers:text", "returned str"),
        ("strangers:raises", "ValueError: no luck .*strangers.py:10"),
        ("absent.py:net", "no file absent.py"),
    ],
)
def test_what_cannot_be_made_is_one_message(folder: Path, target: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make("factory", target, {})


def test_wrong_arguments_and_wrong_inputs_are_one_message(folder: Path) -> None:
    with pytest.raises(UsageError, match="unexpected keyword argument 'depth'"):
        make("factory", "strangers:net", {"depth": 3})
    with pytest.raises(UsageError, match=r"does not run on images:2x3x2x2") as caught:
        describe(Source("factory", "strangers:net"), {}, img_size=(2, 2))
    assert "--input" in caught.value.hint


@pytest.mark.parametrize("family", ["timm", "torchvision", "hf"])
def test_a_missing_package_says_what_to_install(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = {"hf": "transformers"}.get(family, family)
    monkeypatch.setitem(sys.modules, package, None)  # what import does where the package is not installed
    with pytest.raises(EnvironmentUnsuitable) as caught:
        make(family, "anything", {})
    assert caught.value.hint == f"pip install {package}"


@pytest.mark.parametrize("family", ["timm", "torchvision"])
def test_an_unknown_name_suggests(family: str) -> None:
    import_timm()
    with pytest.raises(UsageError, match="has no model 'swin_tin'"):
        make(family, "swin_tin", {})


def test_the_image_is_of_the_size_that_the_model_was_made_for() -> None:
    import_timm()
    made = {"img_size": [32, 48], "in_chans": 1, **{key: TINY_VIT[key] for key in ("depth", "embed_dim", "num_heads")}}
    assert describe(Source("timm", "vit_tiny_patch16_224"), made).spec.inputs[0].shape == (1, 32, 48)


def test_timm_tells_its_image_recipe() -> None:
    import_timm()
    variant = describe(Source("timm", "vit_tiny_patch16_224"), {"num_classes": 5})
    assert variant.spec.inputs[0].shape == (3, 224, 224)
    assert variant.preprocessing is not None
    assert variant.preprocessing.mean == (0.5, 0.5, 0.5)
    assert build(variant.spec)(torch.zeros(1, 3, 224, 224)).shape == (1, 5)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module]:
    """A small transformers model with its weights, in a folder."""
    transformers = import_transformers()
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit", model


def test_a_transformers_folder_brings_its_weights(saved: tuple[Path, nn.Module]) -> None:
    folder, model = saved
    variant = describe(Source("hf", str(folder)), {})
    assert variant.spec.inputs[0].shape == (3, 32, 32)
    path = own_checkpoint(variant.spec.config["target"])
    assert path == folder / "model.safetensors"
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(load(variant.spec, path).model(images).logits, model(images).logits)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")  # what older releases wrote
    assert own_checkpoint(str(folder)) == path
    path.unlink()
    assert own_checkpoint(str(folder)) == folder / "pytorch_model.bin"


def test_other_weights_than_its_own_are_refused(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, _ = saved
    request = ExportOptions(f"hf:{folder}", tmp_path / "artifacts", pretrained=HubFile("owner/name"))
    with pytest.raises(UsageError, match="brings its own weights"):
        export(request)
    assert not list((tmp_path / "artifacts").glob("*"))


def test_a_transformers_repository_is_pinned(
    saved: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: (saved[0] / name).read_bytes() for name in ("config.json", "model.safetensors")}
    with serving(Hub("owner/vit", files), tmp_path / "cache", monkeypatch) as hub:
        variant = describe(Source("hf", "owner/vit"), {})
        assert variant.spec.config["target"] == f"owner/vit@{COMMIT}"
        path = own_checkpoint(variant.spec.config["target"])
        assert path is not None
        assert path.read_bytes() == files["model.safetensors"]
        hub.requests.clear()
        build(variant.spec)
        assert not [request for request in hub.requests if request.startswith("GET")]


def test_timm_weights_come_from_its_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = import_timm()
    published = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    variant = describe(Source("timm", "vit_tiny_patch16_224"), {"depth": 1})
    assert variant.pretrained is not None
    files = {"model.safetensors": save(dict(published.state_dict()))}
    with serving(Hub(variant.pretrained.repo, files), tmp_path / "cache", monkeypatch):
        fetched = fetch(variant.pretrained)
        loaded = load(variant.spec, fetched.path, source="pretrained", origin=fetched.origin)
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(images), published(images))


TINY_VIT = {"depth": 1, "img_size": 32, "embed_dim": 24, "num_heads": 3}


def test_the_number_of_classes_is_read_from_a_library_head(tmp_path: Path, saved: tuple[Path, nn.Module]) -> None:
    timm = import_timm()
    import torchvision

    transformers = import_transformers()
    folder, model = saved
    own = {key: value for key, value in model.config.to_dict().items() if not key.endswith(("2label", "2id"))}
    cases: list[tuple[Source, dict[str, object], nn.Module]] = [
        (
            Source("timm", "vit_tiny_patch16_224"),
            TINY_VIT,
            timm.create_model("vit_tiny_patch16_224", num_classes=7, **TINY_VIT),
        ),
        (Source("torchvision", "squeezenet1_1"), {}, torchvision.models.squeezenet1_1(num_classes=7)),
        (
            Source("hf", str(folder)),
            {},
            transformers.ViTForImageClassification(transformers.ViTConfig(**{**own, "num_labels": 7})),
        ),
    ]
    for source, kwargs, finetuned in cases:
        path = tmp_path / "finetuned.pth"
        torch.save({"state_dict": {f"model.{key}": value for key, value in finetuned.state_dict().items()}}, path)
        variant = describe(source, kwargs, img_size=None)
        loaded = load(variant.spec, path)
        assert (loaded.weights.classes, loaded.weights.prefix) == (7, "model.")
        option = "num_labels" if source.family == "hf" else "num_classes"
        assert loaded.spec.config["kwargs"] == {**kwargs, option: 7}
        image = torch.randn(1, *variant.spec.inputs[0].shape)
        with torch.inference_mode():
            expected, found = finetuned.eval()(image), loaded.model(image)
        torch.testing.assert_close(*((expected, found) if source.family != "hf" else (expected.logits, found.logits)))
        # The spec that the manifest keeps makes the same model again, and what was asked for must be what is there.
        assert load(loaded.spec, path).spec == loaded.spec
        asked = describe(source, with_classes(source, kwargs, 5)).spec
        with pytest.raises(UsageError, match="head has 7 classes") as refused:
            load(asked, path, num_classes=5)
        assert refused.value.hint == "--num-classes 7"
        with pytest.raises(UsageError, match="head has 7 classes"):
            load(asked, path)


def test_a_library_checkpoint_of_another_shape_says_which_option_helps(tmp_path: Path) -> None:
    timm = import_timm()
    source, path = Source("timm", "vit_tiny_patch16_224"), tmp_path / "weights.pth"

    def hint(kwargs: dict[str, object], *without: str) -> str:
        state = timm.create_model(source.target, **{**TINY_VIT, **kwargs}).state_dict()
        torch.save({key: value for key, value in state.items() if key not in without}, path)
        with pytest.raises(UsageError, match="does not belong to this model") as refused:
            load(describe(source, TINY_VIT).spec, path)
        return refused.value.hint

    assert hint({"img_size": 48}) == "--model-kwargs, such as the image size it was trained at, or another model name"
    assert hint({"img_size": 48, "num_classes": 7}).startswith("--num-classes 7, or --model-kwargs")
    assert "num_classes" in (headless := hint({"num_classes": 0}))
    assert headless == hint({}, "head.weight", "head.bias")
    kwargs = {**TINY_VIT, "num_classes": 0}
    torch.save(timm.create_model(source.target, **kwargs).state_dict(), path)
    assert load(describe(source, kwargs).spec, path).weights.classes is None


def test_transformers_prints_no_names_of_the_file(
    saved: tuple[Path, nn.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, model = saved
    state = dict(model.state_dict())
    state["a\x1b[2J"] = state.pop("classifier.bias")
    torch.save(state, tmp_path / "weights.pth")
    capfd.readouterr()
    with pytest.raises(UsageError, match=r"unexpected \(1\): 'a\\x1b\[2J'"):
        load(describe(Source("hf", str(folder)), {}).spec, tmp_path / "weights.pth")
    assert "\x1b[2J" not in "".join((*capfd.readouterr(), caplog.text))


def test_a_backbone_takes_no_number_of_classes(saved: tuple[Path, nn.Module]) -> None:
    config = saved[0] / "config.json"
    config.write_text(config.read_text().replace("ViTForImageClassification", "ViTModel"))
    with pytest.raises(UsageError, match="is no classifier"):
        describe(Source("hf", str(saved[0])), {"num_labels": 5})


def test_detectors_have_no_head_of_classes() -> None:
    import_timm()
    import torchvision

    detector = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    assert classes_of("torchvision", detector) is None


def test_classes_are_given_once_and_to_libraries() -> None:
    timm, factory = Source("timm", "vit_tiny_patch16_224"), Source("factory", "mine:net")
    assert with_classes(timm, {"depth": 1}, 5) == {"depth": 1, "num_classes": 5}
    assert with_classes(factory, {"depth": 1}, None) == {"depth": 1}
    with pytest.raises(UsageError, match="num_classes 3"):
        with_classes(timm, {"num_classes": 3}, 5)
    with pytest.raises(UsageError, match="a function of your own") as refused:
        with_classes(factory, {}, 5)
    assert "--model-kwargs" in refused.value.hint


@pytest.mark.parametrize("key", ["classifier.bias", "vit.encoder.layer.0.layernorm_before.weight"])
def test_transformers_casts_nothing_in_silence(key: str, saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, model = saved
    variant = describe(Source("hf", str(folder)), {})
    state = model.state_dict()
    name = next(known for known in state if known.rpartition(".")[2] == key.rpartition(".")[2] and key[:4] in known)
    for dtype, message in ((torch.int64, "holds integers"), (torch.complex64, "imaginary part would be lost")):
        changed = {(key if known == name else known): value for known, value in state.items()}
        changed[key] = changed[key].to(dtype)
        torch.save(changed, tmp_path / "changed.pth")
        with pytest.raises(UsageError, match=f"{key} {message}" if dtype == torch.int64 else message):
            load(variant.spec, tmp_path / "changed.pth")


def test_a_prefix_of_the_models_own_stays(tmp_path: Path, folder: Path) -> None:
    variant = describe(Source("factory", "strangers:wrapped"), {}, inputs=(TensorSpec("x", (3,)),))
    state = build(variant.spec).state_dict()
    assert set(state) == {"module.weight", "module.bias"}
    for prefix in ("", "model.", "module."):
        torch.save({f"{prefix}{key}": value for key, value in state.items()}, tmp_path / "weights.pth")
        assert load(variant.spec, tmp_path / "weights.pth").weights.prefix == prefix


@pytest.mark.parametrize(
    ("torch_version", "hint"),
    [
        ("2.13.0+cpu", ' "torchvision==0.28.*" --index-url https://download.pytorch.org/whl/cpu'),
        ("2.9.1+cu128", ' "torchvision==0.24.*" --index-url https://download.pytorch.org/whl/cu128'),
        ("2.11.0", ' "torchvision==0.26.*"'),
        ("3.0.0", " torchvision"),
    ],
)
def test_a_torchvision_that_does_not_fit_is_named(
    torch_version: str, hint: str, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    (folder / "strangers.py").write_text(
        "def net():\n    raise RuntimeError('operator torchvision::nms does not exist')"
    )
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr("importlib.metadata.version", {"torchvision": "0.27.1"}.__getitem__)
    with pytest.raises(EnvironmentUnsuitable) as refused:
        make("factory", "strangers:net", {})
    assert f"torchvision 0.27.1 does not fit PyTorch {torch_version}" in refused.value.found
    assert "operator torchvision::nms does not exist" in refused.value.found
    assert refused.value.hint == f"pip install --force-reinstall --no-deps{hint}"


def test_an_output_named_like_an_input_gets_another_name(folder: Path) -> None:
    inputs = (TensorSpec("sum", (3,)), TensorSpec("right", (3,)))
    variant = describe(Source("factory", "strangers:Pair"), {}, inputs=inputs)
    assert variant.spec.outputs == ("sum_output", "both_0", "both_2")


def test_what_is_no_transformers_model_is_refused(tmp_path: Path) -> None:
    import_transformers()
    with pytest.raises(DeployError, match="no transformers model"):
        make("hf", str(tmp_path), {})


def test_weights_in_several_files_are_refused(saved: tuple[Path, nn.Module]) -> None:
    (saved[0] / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="several files"):
        own_checkpoint(str(saved[0]))


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"image_mean": [0.5, 0.5]}', "$.image_mean"),
        ('{"image_std": [0.5, 0, 0.5]}', "$.image_std"),
        ('{"crop_pct": "all"}', "$.crop_pct"),
        ("[]", "$"),
    ],
)
def test_a_processor_that_is_none(tmp_path: Path, text: str, field: str) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(text)
    with pytest.raises(IntegrityError, match=re.escape(f"malformed at {field}")):
        codec.load(path, _Processor, what="a processor", partial=True)
    path.write_text('{"image_mean": null, "do_resize": true, "resample": 2}')
    assert codec.load(path, _Processor, what="a processor", partial=True) == _Processor(resample=2)
