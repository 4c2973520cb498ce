"""How windows tile the feature maps of a hierarchical transformer: arithmetic only, without PyTorch."""

from __future__ import annotations

from itertools import product

from deploycli.models.errors import UsageError


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
