"""Names, aliases, and configuration, all without PyTorch."""

import json
import subprocess
import sys
from typing import Any

import pytest

from deploycli.models.codec import decode
from deploycli.models.errors import UsageError
from deploycli.models.registry import configure, register, resolve, variants
from deploycli.models.spec import ModelSpec, Preprocessing, TensorSpec
from deploycli.models.variants import Variant
from tests.peers import import_timm


def test_listing_and_unknown_names_import_nothing_heavy() -> None:
    code = (
        "import sys; from deploycli.models.registry import resolve, variants; assert variants()\n"
        "try: resolve('swin_x')\nexcept Exception as error: assert 'swin_t' in str(error)\n"
        "import deploycli.exporters.data.pictures, deploycli.models.hub\n"
        "heavy = {'torch', 'safetensors', 'huggingface_hub', 'timm'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("swin_t", "swin_t"),
        ("swin_tiny_patch4_window7_224", "swin_t"),
        ("swin_tiny_patch4_window7_224.ms_in1k", "swin_t"),
        ("swin_base_patch4_window12_384", "swin_b_384"),
        ("swin_base_patch4_window7_224_22k", "swin_b_22k"),
        ("swin_large_patch4_window12_384_22kto1k", "swin_l_384"),
        ("vit_base_patch16_224", "vit_b_16"),
        ("vit_base_patch16_224_in21k", "vit_b_16_in21k"),
        ("vit_base_patch16_224.augreg_in21k", "vit_b_16_augreg_in21k"),
        ("vit_huge_patch14_224_in21k", "vit_h_14_in21k"),
        ("vit_large_patch32_384", "vit_l_32_384"),
        ("deit_tiny_distilled_patch16_224", "deit_t_distilled"),
        ("deit_base_patch16_384.fb_in1k", "deit_b_384"),
    ],
)
def test_short_and_long_names_resolve(name: str, short: str) -> None:
    assert resolve(name).name == short


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("swin_tt", "swin_t"),
        ("Swin-T", "swin_t"),
        ("swin_b_385", "swin_b_384"),
        ("swin_base_patch4_window7_22", "swin_base_patch4_window7_224"),
        ("zzzzzz", "swin_t"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UsageError, match="unknown model") as failure:
        resolve(name)
    assert failure.value.exit_code == 2
    assert failure.value.hint.replace(",", "").split()[0] == nearest


def test_patterns_match_names_and_aliases() -> None:
    def names(pattern: str | None = None) -> list[str]:
        return [v.name for v in variants(pattern)]

    assert names("swin") == [name for name in names() if name.startswith("swin")]
    assert set(names("swin")) < set(names())
    assert names("swin_?") == ["swin_t", "swin_s", "swin_b", "swin_l"]
    assert names("swin_*_384") == ["swin_b_384", "swin_l_384"]
    assert names("swin_tiny") == ["swin_t", "swin_t_22k"]
    assert names("nothing") == []


@pytest.mark.parametrize("variant", [v for v in variants() if v.pretrained], ids=lambda v: v.name)
def test_preprocessing_and_classes_are_timms(variant: Variant) -> None:
    timm = import_timm()
    assert variant.pretrained is not None
    published = timm.get_pretrained_cfg(variant.pretrained.repo.removeprefix("timm/"))
    recipe = variant.preprocessing
    assert (3, *recipe.size) == published.input_size == variant.spec.inputs[0].shape
    assert variant.spec.config["num_classes"] == published.num_classes
    assert (recipe.crop_pct, recipe.interpolation) == (published.crop_pct, published.interpolation)
    assert (recipe.mean, recipe.std) == (published.mean, published.std)
    assert variant.summary


def test_a_configured_variant_is_a_new_one() -> None:
    plain = resolve("swin_t")
    changed = configure(plain, img_size=(256, 512), window_size=8, num_classes=10, ape=True)
    assert plain == resolve("swin_t")
    assert changed.spec.inputs == (TensorSpec("images", (3, 256, 512)),)
    assert changed.spec.outputs == ("logits",)
    assert changed.preprocessing == Preprocessing((256, 512))
    assert changed.spec.config == {
        **plain.spec.config,
        "img_size": [256, 512],
        "window_size": 8,
        "num_classes": 10,
        "ape": True,
    }
    assert configure(plain) == plain
    assert configure(plain, img_size=224) == plain


@pytest.mark.parametrize("variant", variants(), ids=lambda v: v.name)
def test_a_spec_survives_json(variant: Variant) -> None:
    spec = variant.spec
    assert decode(json.dumps(spec.to_json()), ModelSpec, where="it", what="a spec") == spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 0}, "num_classes is 0"),
        ({"window_size": -7}, "window_size is -7"),
        ({"img_size": (224, 0)}, "img_size"),
        ({"windowsize": 7}, "try: window_size"),
    ],
)
def test_impossible_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as failure:
        configure(resolve("swin_t"), **changes)
    assert message in str(failure.value)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="already registered: swin_t"):
        register(resolve("swin_t"))
