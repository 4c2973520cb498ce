"""The weights that a user's own function brings: their hash, and whether they are its own or drawn at random."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deploycli.models.build import build
from deploycli.models.spec import Weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from deploycli.models.spec import ModelSpec


def build_factory(spec: ModelSpec, *, seed: int) -> tuple[nn.Module, Weights]:
    """Call a user's own function, and say whose the weights are: the function's, or drawn at random.

    It is called under another seed, too, since what it draws differs then. Where all that it brings is drawn, or zeros
    and ones as layers start, the weights are random; otherwise they are the function's.

    Args:
        spec: of the family ``factory``.
        seed: for PyTorch, NumPy and ``random``.

    Raises:
        UsageError: it cannot be called, or raises.
    """
    other = Fingerprint.of(build(spec, seed=seed + 1))
    module = build(spec, seed=seed)
    found = Fingerprint.of(module)
    source = "random" if found.is_random(other) else "factory"
    return module, Weights(source, seed=seed, sha256=found.sha256, drawn=found.drawn(other))


@dataclass(frozen=True)
class Fingerprint:
    """A module's state dict by hashes.

    Attributes:
        tensors: name -> SHA-256 of the tensor's type, shape and bytes.
        filled: those parameters that are zeros or ones throughout, as layers start.
        parameters: the names of the parameters; the others are buffers.
    """

    tensors: Mapping[str, str]
    filled: frozenset[str]
    parameters: frozenset[str]

    @classmethod
    def of(cls, module: nn.Module) -> Fingerprint:
        """Hash every tensor of the state dict; what is no tensor in it is known by its type alone."""
        state = module.state_dict()
        parameters = frozenset(name for name, _ in module.named_parameters(remove_duplicate=False))
        filled = frozenset(name for name in parameters & state.keys() if _is_filled(state[name]))
        return cls({name: _sha256(value) for name, value in state.items()}, filled, parameters)

    @property
    def sha256(self) -> str:
        """The hash of them all, names included."""
        lines = "".join(f"{name}\0{digest}\n" for name, digest in self.tensors.items())
        return hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()

    def drawn(self, under_another_seed: Fingerprint) -> int:
        """Return how many tensors differ from those that the same function brings under another seed."""
        other = under_another_seed.tensors
        return sum(digest != other.get(name) for name, digest in self.tensors.items())

    def is_random(self, under_another_seed: Fingerprint) -> bool:
        """Say whether no parameter is the function's own: each is drawn, or zeros or ones as layers start."""
        other = under_another_seed.tensors
        own = (n for n in self.parameters - self.filled if self.tensors.get(n) == other.get(n))
        return self.drawn(under_another_seed) > 0 and next(own, None) is None


def _is_filled(value: Tensor) -> bool:
    if value.is_meta or value.is_quantized or value.layout != torch.strided or not value.numel():
        return False
    first = value.flatten()[0]
    return bool((first == 0) | (first == 1)) and bool((value == first).all())


def _sha256(value: object) -> str:
    if not isinstance(value, Tensor):
        return hashlib.sha256(type(value).__qualname__.encode()).hexdigest()
    digest = hashlib.sha256(f"{value.dtype} {list(value.shape)}\n".encode())
    if not value.is_meta:
        value = value.detach().cpu()
        value = value.int_repr() if value.is_quantized else value.to_dense()
        digest.update(value.resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
