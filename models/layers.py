"""Layers that several vision transformers share, in their authors' naming of parameters."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn

from deploycli.models.errors import UsageError


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, applied to each token.

    Args:
        dim: channels in and out.
        hidden_dim: channels in between.
        drop: dropout rate after each linear layer.
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [..., dim] to [..., dim]."""
        x = self.drop(self.act(self.fc1(x)))
        out: Tensor = self.drop(self.fc2(x))
        return out


class DropPath(nn.Module):
    """Stochastic depth (https://arxiv.org/abs/1603.09382): in training, drop a residual branch for whole samples.

    Args:
        rate: probability that a sample loses the branch; the kept ones are scaled by ``1 / (1 - rate)``.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` [B, ...] in evaluation, and with dropped samples in training."""
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * kept / keep

    def extra_repr(self) -> str:
        """Show the rate."""
        return f"rate={self.rate:.3f}"


class PatchEmbed(nn.Module):
    """Cut the image into patches and embed each one linearly, as a convolution whose stride is its kernel.

    Args:
        img_size: height and width, pixels.
        patch_size: side of a patch, pixels.
        in_chans: channels of the image.
        embed_dim: channels of a token.
        norm: whether a LayerNorm follows.
    """

    def __init__(
        self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int, *, norm: bool = False
    ) -> None:
        super().__init__()
        self.img_size = img_size
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim) if norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Embed images [B, in_chans, H, W] as tokens [B, H/patch * W/patch, embed_dim], row by row.

        Raises:
            ValueError: the images have another size; position tables and masks hold for one size only.
        """
        if tuple(images.shape[2:]) != self.img_size:
            raise ValueError(f"images are {tuple(images.shape[2:])}, the model was built for {self.img_size}")
        x = self.proj(images).flatten(2).transpose(1, 2)  # [B, C, H, W] -> [B, H*W, C]
        tokens: Tensor = self.norm(x)
        return tokens


def relative_position_index(window_size: int) -> Tensor:
    """Return the row of the bias table for each pair of tokens in a window, [ws*ws, ws*ws], int64.

    Offsets run from ``1 - ws`` to ``ws - 1`` on each axis; the table holds them row by row.
    """
    side = torch.arange(window_size)
    token = torch.stack(torch.meshgrid(side, side, indexing="ij")).flatten(1)  # [2, ws*ws]
    offset = token[:, :, None] - token[:, None, :] + window_size - 1  # [2, ws*ws, ws*ws], from 0
    return offset[0] * (2 * window_size - 1) + offset[1]


def drop_path_rates(rate: float, blocks: int) -> list[float]:
    """Return stochastic depth rates that grow linearly from 0 in the first block to ``rate`` in the last."""
    return [rate * i / max(1, blocks - 1) for i in range(blocks)]


def init_transformer(module: nn.Module) -> None:
    """Initialise as ViT and its descendants do: linear weights truncated normal, std 0.02; biases zero; gains one."""
    if isinstance(module, nn.Linear):
        trunc_normal(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def trunc_normal(tensor: Tensor) -> None:
    """Fill in place from a normal distribution of standard deviation 0.02, cut at -2 and 2."""
    with torch.no_grad():
        nn.init.trunc_normal_(tensor, std=0.02)


# --- How windows tile the feature maps of a hierarchical transformer: arithmetic only


def effective_window(resolution: tuple[int, int], window_size: int) -> int:
    """Return the side of the windows on a feature map: a map that is not larger than the window is one window."""
    return min(window_size, *resolution)


def misfit(img_size: tuple[int, int], patch_size: int, window_size: int, stages: int, *, noun: str = "window") -> str:
    """Say why an image size cannot be used; empty if it can.

    Args:
        img_size: height and width, pixels.
        patch_size: side of a patch, pixels.
        window_size: side of a window, tokens.
        stages: number of stages; between two of them the feature map halves.
        noun: what the family calls a window.
    """
    if img_size[0] % patch_size or img_size[1] % patch_size:
        return f"patches of {patch_size}x{patch_size} pixels do not tile it"
    height, width = img_size[0] // patch_size, img_size[1] // patch_size
    for stage in range(stages):
        tokens = f"stage {stage + 1} has {height}x{width} tokens"
        window = effective_window((height, width), window_size)
        if height % window or width % window:
            return f"{tokens}, which {noun}s of {window}x{window} do not tile"
        if stage < stages - 1:
            if height % 2 or width % 2:
                return f"{tokens}, which cannot be merged two by two"
            height, width = height // 2, width // 2
    return ""


def check_fit(
    img_size: tuple[int, int],
    patch_size: int,
    window_size: int,
    stages: int,
    *,
    noun: str = "window",
    option: str = "--window-size",
) -> None:
    """Raise UsageError, naming sizes and windows that do fit, unless the windows tile every stage's feature map.

    Args:
        img_size: height and width, pixels.
        patch_size: side of a patch, pixels.
        window_size: side of a window, tokens.
        stages: number of stages; between two of them the feature map halves.
        noun: what the family calls a window.
        option: the command line's option for ``window_size``; empty if it has none.
    """
    reason = misfit(img_size, patch_size, window_size, stages, noun=noun)
    if not reason:
        return
    unit = patch_size * 2 ** (stages - 1)  # the last stage's map needs whole tokens
    hints = [_size_hint(img_size, patch_size, window_size, stages)]
    others = range(max(2, window_size // 2), 2 * window_size) if option else ()
    windows = [w for w in others if not misfit(img_size, patch_size, w, stages)]
    windows = sorted(sorted(windows, key=lambda w: abs(w - window_size))[:4])
    hints += [f"{option} {' or '.join(map(str, windows))}"] if windows else []
    raise UsageError(
        f"images of {img_size[0]}x{img_size[1]} do not fit a {noun} of {window_size}: {reason}",
        expected=f"sides that are multiples of {unit} and that the {noun}s tile, such as any multiple of "
        f"{unit * window_size}",
        hint=", or ".join(hints),
    )


def check_halves(img_size: tuple[int, int], patch_size: int, stages: int) -> None:
    """Raise UsageError, naming sizes that fit, unless the feature map of each stage halves to that of the next.

    It is all that a family asks for which pads its maps to its windows.
    """
    reason = misfit(img_size, patch_size, 1, stages)  # windows of one token tile every map
    if reason:
        raise UsageError(
            f"images of {img_size[0]}x{img_size[1]} do not fit: {reason}",
            expected=f"sides that are multiples of {patch_size * 2 ** (stages - 1)}",
            hint=_size_hint(img_size, patch_size, 1, stages),
        )


def _size_hint(img_size: tuple[int, int], patch_size: int, window_size: int, stages: int) -> str:
    sizes = _nearest_sizes(img_size, patch_size, window_size, stages)
    return f"--img-size {' or '.join(f'{h}' if h == w else f'{h}x{w}' for h, w in sizes)}"


def _nearest_sizes(
    img_size: tuple[int, int], patch_size: int, window_size: int, stages: int, count: int = 3
) -> list[tuple[int, int]]:
    """Return the fitting sizes that are nearest to the one asked for; square ones if that is square."""
    unit = patch_size * 2 ** (stages - 1)
    reach = unit * window_size  # each multiple of it fits, so one is never farther away
    sides = [range(unit, side + reach + unit, unit) for side in img_size]
    square = img_size[0] == img_size[1]
    candidates = ((h, w) for h, w in product(*sides) if h == w or not square)
    fitting = [size for size in candidates if not misfit(size, patch_size, window_size, stages)]
    fitting.sort(key=lambda size: abs(size[0] - img_size[0]) + abs(size[1] - img_size[1]))
    return sorted(fitting[:count])
