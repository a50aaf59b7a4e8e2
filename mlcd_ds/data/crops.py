"""Training's crop boxes, as numbers: the augmentation is decided here and carried out by DALI (or the plain reference).

Boxes are [N, 4] int32: top, left, height, width, in pixels of the decoded image.
"""

from __future__ import annotations

import numpy as np

from mlcd_ds.data.order import uniforms

NUM_TRIES = 10
NUM_DRAWS = 4 * NUM_TRIES + 1


def random_boxes(
    sizes_N2: np.ndarray,
    ids_N: np.ndarray,
    epoch: int,
    seed: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Random-resized-crop boxes, and flips [N] int32 (probability one half).

    As in the field: the area is uniform in `area` (of the image), the aspect ratio log-uniform in `aspect`; the first
    of ten draws that fits into the image is taken, else the largest centre crop of an allowed aspect ratio.
    """
    draws = uniforms(seed, epoch, ids_N, NUM_DRAWS)
    tries = draws[:, :-1].reshape(len(ids_N), NUM_TRIES, 4)
    height_N1, width_N1 = sizes_N2[:, :1].astype(np.float64), sizes_N2[:, 1:].astype(np.float64)
    target = height_N1 * width_N1 * (area[0] + (area[1] - area[0]) * tries[:, :, 0])
    ratio = np.exp(np.log(aspect[0]) + np.log(aspect[1] / aspect[0]) * tries[:, :, 1])
    w, h = np.round(np.sqrt(target * ratio)), np.round(np.sqrt(target / ratio))
    fits = (w >= 1) & (h >= 1) & (w <= width_N1) & (h <= height_N1)
    first, row = fits.argmax(axis=1), np.arange(len(ids_N))
    h, w = h[row, first], w[row, first]
    top = np.floor(tries[row, first, 2] * (height_N1[:, 0] - h + 1))
    left = np.floor(tries[row, first, 3] * (width_N1[:, 0] - w + 1))
    boxes = np.stack([top, left, h, w], axis=1)
    boxes[~fits.any(axis=1)] = _fallback(sizes_N2[~fits.any(axis=1)], aspect)
    return boxes.astype(np.int32), (draws[:, -1] < 0.5).astype(np.int32)


def _fallback(sizes_N2: np.ndarray, aspect: tuple[float, float]) -> np.ndarray:
    """The largest centre crop whose aspect ratio is allowed."""
    height, width = sizes_N2[:, 0].astype(np.float64), sizes_N2[:, 1].astype(np.float64)
    w = np.maximum(1, np.floor(np.minimum(width, height * aspect[1])))
    h = np.maximum(1, np.floor(np.minimum(height, width / aspect[0])))
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)
