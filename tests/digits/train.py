"""Train the models of this folder: ``python -m tests.digits.train [NAME...] [--seed N] [--validate]``.

The recipe was chosen with ``--validate``, which trains on the earlier writers of the training split and scores on the
later ones; the test split is scored once, when the weights are final, and chooses nothing.

One thread and deterministic algorithms: on one machine, the same seed gives the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from deploycli.models.build import build
from deploycli.models.files import sha256_of
from deploycli.models.registry import resolve
from tests.digits import NAMES, PREPROCESSING, Split, arrays, checkpoint, registered

if TYPE_CHECKING:
    from collections.abc import Iterator

VALIDATION_SIZE = 257  # the last pictures of the training split


@dataclass(frozen=True)
class Recipe:
    """How the models are trained.

    Attributes:
        epochs: passes over the training split.
        batch_size: pictures of a step; an epoch's rest that makes no whole batch is left out.
        learning_rate: its highest value, after the warm-up; from there it falls to zero along a cosine.
        warmup: share of the steps in which the learning rate rises.
        weight_decay: of AdamW, on everything that is learned but vectors (biases, gains).
        gradient_norm: above it, a step's gradient is scaled down to it.
        label_smoothing: share of the target that is spread over all classes.
        rotation: largest turn of a picture, radians.
        shift: largest shift of a picture, as a share of its side.
        zoom: largest change of a picture's size, as a share of it.
    """

    epochs: int = 80
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup: float = 0.1
    weight_decay: float = 0.05
    gradient_norm: float = 1.0
    label_smoothing: float = 0.1
    rotation: float = 0.2
    shift: float = 0.08
    zoom: float = 0.1


RECIPE = Recipe()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on scikit-learn's digits.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate", action="store_true", help="score on part of the training split; write nothing")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")

    torch.set_num_threads(1)  # the order of additions, and so the last bits, depend on the number of threads
    torch.use_deterministic_algorithms(True)
    images, labels = tensors("train")
    for name in options.names or NAMES:
        start = time.perf_counter()
        if options.validate:
            model, _ = train(name, images[:-VALIDATION_SIZE], labels[:-VALIDATION_SIZE], seed=options.seed)
            right = top1(model, images[-VALIDATION_SIZE:], labels[-VALIDATION_SIZE:])
            print(f"{name}: {right}/{VALIDATION_SIZE} on validation, {time.perf_counter() - start:.0f} s")
        else:
            model, _ = train(name, images, labels, seed=options.seed)
            test_images, test_labels = tensors("test")
            right = top1(model, test_images, test_labels)
            save(model, checkpoint(name), seed=options.seed, right=right, total=len(test_labels))
            print(f"{name}: {right}/{len(test_labels)} on test, {time.perf_counter() - start:.0f} s")


def tensors(split: Split) -> tuple[Tensor, Tensor]:
    """Return a split's inputs [N, 3, H, W] and labels [N]."""
    images, labels = arrays(split)
    return torch.from_numpy(images), torch.from_numpy(labels)


def train(
    name: str, images: Tensor, labels: Tensor, *, seed: int, recipe: Recipe = RECIPE, steps: int | None = None
) -> tuple[nn.Module, list[float]]:
    """Train a model from random weights.

    Args:
        name: the model.
        images: its inputs [N, 3, H, W].
        labels: their classes [N].
        seed: determines the weights, the order of the pictures and their augmentation; the caller's random state is
            neither used nor changed.
        recipe: how.
        steps: where to stop, for a trial; None for the whole recipe.

    Returns:
        The model in evaluation mode, and the loss of each step.
    """
    with registered():
        model = build(resolve(name).spec, seed=seed)
    total = recipe.epochs * (len(images) // recipe.batch_size)
    optimizer = torch.optim.AdamW(_parameter_groups(model, recipe), lr=recipe.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, total, recipe))
    losses: list[float] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.train()
        for batch in _batches(len(images), recipe):
            logits = model(_augment(images[batch], recipe))  # [B, 10]
            loss = functional.cross_entropy(logits, labels[batch], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_norm)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            if len(losses) == steps:
                break
    return model.eval(), losses


@torch.inference_mode()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Count the pictures that a model classifies rightly."""
    predicted = torch.cat([model(batch).argmax(dim=1) for batch in images.split(90)])
    return int((predicted == labels).sum())


def save(model: nn.Module, path: Path, *, seed: int, right: int, total: int, recipe: Recipe = RECIPE) -> None:
    """Write what was learned, and how; derived buffers are left out, as they follow from the configuration."""
    learned = {key: value.detach().contiguous() for key, value in model.named_parameters()}
    training = {
        "seed": seed,
        "recipe": asdict(recipe),
        "test_right": right,
        "test_total": total,
        "torch": torch.__version__,
        "train.py": sha256_of(Path(__file__)),
    }
    # One entry, because safetensors writes several in no fixed order, and a retrained file should be the same file.
    save_file(learned, path, {"training": json.dumps(training)})


def _batches(count: int, recipe: Recipe) -> Iterator[Tensor]:
    """Yield the positions of each step's pictures, [batch_size]."""
    for _ in range(recipe.epochs):
        order = torch.randperm(count)
        yield from order[: count - count % recipe.batch_size].split(recipe.batch_size)


def _augment(images: Tensor, recipe: Recipe) -> Tensor:
    """Turn, shift and zoom each picture [3, H, W] of a batch [B, 3, H, W] a little; what comes in is background."""

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(len(images)) - 1) * limit  # [B]

    angle, zoom = uniform(recipe.rotation), 1 + uniform(recipe.zoom)
    right, down = uniform(2 * recipe.shift), uniform(2 * recipe.shift)  # the grid's sides are 2
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rows = [torch.stack([cos, -sin, right], dim=1), torch.stack([sin, cos, down], dim=1)]  # 2 of [B, 3]
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)  # [B, H, W, 2]
    background = -PREPROCESSING.mean[0] / PREPROCESSING.std[0]  # black; outside the picture the sampler gives zero
    return functional.grid_sample(images - background, grid, align_corners=False) + background


def _parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, object]]:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _learning_rate_factor(step: int, total: int, recipe: Recipe) -> float:
    rising = recipe.warmup * total
    if step < rising:
        return (step + 1) / (rising + 1)
    return (1 + math.cos(math.pi * (step - rising) / (total - rising))) / 2


if __name__ == "__main__":
    main()
