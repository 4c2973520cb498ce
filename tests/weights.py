"""The rule that regenerates the weights and images of tests/golden (see its README)."""

import zlib

import numpy as np
import numpy.typing as npt

TOLERANCE = 2e-5
"""What two implementations of a model may differ by under the same weights, of logits near 1."""


def golden_weight(key: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    z = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "bias":
        value = 0.1 * z
    elif leaf == "weight" and len(shape) == 1:
        value = 1 + 0.1 * z  # gain of a normalisation
    elif leaf == "weight":
        value = z / np.sqrt(np.prod(shape[1:]))  # linear, convolution
    elif leaf == "relative_position_bias_table":
        value = 0.5 * z
    elif leaf == "logit_scale":
        value = 2.5 + z  # some are cut off, above log(100)
    else:
        value = 0.2 * z  # cls_token, dist_token, pos_embed
    return value.astype(np.float32)


def golden_image(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return np.random.RandomState(0).standard_normal(shape).astype(np.float32)
