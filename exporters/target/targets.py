"""The GPUs that TensorRT for RTX compiles for, by compute capability, architecture or name.

Sources: TensorRT for RTX, "Support matrix"; https://developer.nvidia.com/cuda-gpus.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from deploycli.models.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Capability = tuple[Annotated[int, Meta(ge=0, le=99)], Annotated[int, Meta(ge=0, le=9)]]
"""Major and minor compute capability."""

_TURING, _A100, _AMPERE, _ADA, _BLACKWELL, _SPARK = (7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1)

TARGETS: tuple[Capability, ...] = (_TURING, _A100, _AMPERE, _ADA, _BLACKWELL, _SPARK)
"""All that it compiles for."""

DEFAULT_TARGETS = TARGETS[1:]
"""What it compiles for where nothing is named. With Turing among the targets, all get the kernels that Turing can run:
swin_t has 109 launches in FP16, and 96 without it (TensorRT for RTX 1.7.1)."""

_ARCHITECTURES: Mapping[str, tuple[Capability, ...]] = {
    "all": TARGETS,
    "turing": (_TURING,),
    "ampere": (_A100, _AMPERE),
    "ada": (_ADA,),
    "adalovelace": (_ADA,),
    "blackwell": (_BLACKWELL, _SPARK),
}

# What is left of a name without "NVIDIA", "GeForce", "Quadro", spaces and hyphens.
_CARDS: tuple[tuple[str, Capability], ...] = (
    (r"(rtxpro\d{3,4}|rtx(pro)?\d{4}blackwell)(\w*)|rtx50[5-9]0(ti|super|d|laptop|laptopgpu)*", _BLACKWELL),
    (r"gb10|dgxspark", _SPARK),
    (r"rtx(\d{4})ada(generation|laptop)?|rtx40[5-9]0(ti|super|d|laptop|laptopgpu)*|l4|l40|l40s|l20|l2", _ADA),
    (r"rtxa\d{3,4}\w*|rtx30[5-9]0(ti|super|laptop|laptopgpu)*|a2|a10|a10g|a16|a40", _AMPERE),
    (r"a100\w*|a30|a800\w*", _A100),
    (
        r"gtx16[1-6]0(ti|super|laptop|laptopgpu)*|rtx20[5-8]0(ti|super|laptop|laptopgpu)*|rtx[3-8]000|titanrtx|t4|t4g|t\d{3,4}",
        _TURING,
    ),
)
_ELSEWHERE: Mapping[str, str] = {
    r"(h100|h200|h800|h20|gh200|hopper)\w*": "9.0",
    r"(b100|b200|gb200|gb300|b300)\w*": "10.0",
    r"(v100|volta|titanv)\w*": "7.0",
    r"(pascal|p100|p40|p4|gtx10\d0)\w*": "6.x",
    r"(orin|jetson)\w*": "8.7",
    r"(thor)\w*": "11.0",
}
_EXPECTED = "8.6, sm86, turing, ampere, ada, blackwell, all, or a card such as rtx-3090 or l4"

NEEDS: Mapping[str, Capability] = {"fp32 products": _A100, "bf16": _A100, "fp8": _ADA, "fp4": _BLACKWELL}
"""What TensorRT for RTX does not compile for every target -> the lowest for which it does. Seen with 1.7.1: for a type
it says "the model contains HW-specific datatypes", for Turing "FP32 GEMM is not supported"; convolutions are taken."""


def parse_target(text: str) -> tuple[Capability, ...]:
    """Read what the command line names: ``8.6``, ``sm86``, ``rtx-3090``, ``ada``, ``all``.

    Raises:
        UsageError: no such GPU is known, or TensorRT for RTX does not compile for it.
    """
    name = re.sub(r"nvidia|geforce|quadro|tesla|[\s_-]", "", text.lower())
    if name in _ARCHITECTURES:
        return _ARCHITECTURES[name]
    if (number := re.fullmatch(r"(?:sm|cc|compute)?(\d{1,2})(?:\.(\d)|(?<=\d)(\d))", name)) is not None:
        capability = int(number[1]), int(number[2] or number[3])
        if capability in TARGETS:
            return (capability,)
        raise _not_compiled_for(text, dotted(capability))
    for pattern, capability in _CARDS:
        if re.fullmatch(pattern, name):
            return (capability,)
    for pattern, capability_text in _ELSEWHERE.items():
        if re.fullmatch(pattern, name):
            raise _not_compiled_for(text, capability_text)
    raise UsageError(f"--gpu {text!r} names no GPU that is known", expected=_EXPECTED, hint="its compute capability")


def parse_targets(texts: Iterable[str]) -> tuple[Capability, ...]:
    """Read several, each once, lowest first; nothing for nothing."""
    return tuple(sorted({target for text in texts for target in parse_target(text)}))


def lacking(targets: Sequence[Capability], features: Iterable[str]) -> dict[str, tuple[Capability, ...]]:
    """Return, for everything of `NEEDS` in a graph that some targets lack, those targets."""
    found = {feature: tuple(t for t in targets if t < NEEDS[feature]) for feature in features}
    return {feature: below for feature, below in found.items() if below}


def shown(feature: str) -> str:
    """Return something of `NEEDS` as people write it."""
    return re.sub(r"^[bf]+p?\d+", lambda found: found[0].upper(), feature)


def named(targets: Sequence[Capability]) -> str:
    """Return targets in words: ``compute capability 8.6 and 8.9``."""
    *first, last = map(dotted, targets)
    return "compute capability " + (f"{', '.join(first)} and {last}" if first else last)


def dotted(capability: Capability) -> str:
    """Return ``8.6``."""
    return ".".join(map(str, capability))


def _not_compiled_for(text: str, capability: str) -> UsageError:
    return UsageError(
        f"--gpu {text} is of compute capability {capability}, for which TensorRT for RTX does not compile",
        expected=", ".join(map(dotted, TARGETS)),
        hint="--compiler tensorrt, on a machine with that GPU",
    )
