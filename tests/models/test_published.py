"""Every family against what its authors published: what their code answers, and how many parameters it has."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from deploycli.models.build import build, family
from deploycli.models.checkpoint import load
from deploycli.models.registry import configure, resolve
from tests.weights import TOLERANCE, golden_image, golden_weight

GOLDEN = Path(__file__).parents[1] / "golden"

SMALL = {"crossformer_pp": "crossformer_pp_small", "swinv2_wider": "swinv2_t"}
"""Beginning of the name of a golden -> the model that it is a small one of."""


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.json")))
def test_reproduces_the_authors_logits(name: str, tmp_path: Path) -> None:
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    state = {key: torch.from_numpy(golden_weight(key, tuple(facts["shapes"][key]))) for key in facts["learned"]}
    torch.save({"model": state}, tmp_path / "authors.pth")
    _, _, *img_size = facts["image"]
    model = next((whole for start, whole in SMALL.items() if name.startswith(start)), name)
    spec = configure(resolve(model), img_size=tuple(img_size), **facts.get("config", {})).spec

    loaded = load(spec, tmp_path / "authors.pth")

    own = {key: list(value.shape) for key, value in loaded.model.state_dict().items()}
    assert own == facts["shapes"]
    assert {key for key in own if key.rpartition(".")[2] in family(spec.family).derived} == set(facts["derived"])
    with torch.inference_mode():
        logits = loaded.model(torch.from_numpy(golden_image(tuple(facts["image"])))).numpy()
    assert np.abs(logits - np.load(GOLDEN / f"{name}.npz")["logits"]).max() < TOLERANCE


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("swin_t", 28_288_354),
        ("swin_s", 49_606_258),
        ("swin_b", 87_768_224),
        ("swin_l", 196_532_476),
        ("swinv2_t", 28_347_154),
        ("vit_b_16", 86_567_656),
        ("vit_b_32", 88_224_232),
        ("vit_l_16", 304_326_632),
        ("vit_l_32", 306_535_400),
        ("vit_h_14", 632_045_800),
        ("vit_b_16_384", 86_859_496),
        ("vit_b_16_in21k", 103_186_515),  # the body has 85_798_656, layer and head 768 * 769 and 21843 * 769
        ("deit_t", 5_717_416),
        ("deit_s", 22_050_664),
        ("deit_b", 86_567_656),
        ("deit_t_distilled", 5_910_800),
        ("deit_s_distilled", 22_436_432),
        ("deit_b_distilled", 87_338_192),
        ("deit_b_distilled_384", 87_630_032),
        ("crossformer_t", 27_776_794),  # 27.8 M in the paper
        ("crossformer_s", 30_657_394),  # 30.7 M
        ("crossformer_b", 51_971_554),  # 52.0 M
        ("crossformer_l", 91_971_184),  # 92.0 M
        ("crossformer_pp_s", 23_325_340),  # 23.3 M in the paper
        ("crossformer_pp_b", 51_994_594),  # 52.0 M
        ("crossformer_pp_l", 92_001_904),  # 92.0 M
        ("crossformer_pp_h", 95_962_944),  # 96.0 M
    ],
)
def test_has_the_published_number_of_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = build(resolve(name).spec)
    assert sum(p.numel() for p in model.parameters()) == parameters
