"""Colour changes, as numbers: decided here and carried out by DALI (or by the plain reference)."""

from __future__ import annotations

import numpy as np

from mlcd_ds.data.crops import NUM_DRAWS
from mlcd_ds.data.order import uniforms

NUM_COLORS = 4


def random_colors(ids_N: np.ndarray, epoch: int, seed: int, jitter: float, hue: float) -> np.ndarray:
    """float32 [N, 4]: factors on brightness, contrast and saturation, uniform in 1 +- jitter, and a turn of the hue in
    degrees, uniform in +- hue."""
    draws_N4 = uniforms(seed, epoch, ids_N, NUM_DRAWS + NUM_COLORS)[:, NUM_DRAWS:]
    return (np.array([1, 1, 1, 0]) + (2 * draws_N4 - 1) * [jitter, jitter, jitter, hue]).astype(np.float32)


def random_keys(ids_N: np.ndarray, epoch: int, seed: int) -> np.ndarray:
    """int64 [N] in [0, 2^32): where the model draws an image's own random numbers from (models/noise.py)."""
    draws_N = uniforms(seed, epoch, ids_N, NUM_DRAWS + NUM_COLORS + 1)[:, -1]
    return (draws_N * 2**32).astype(np.int64)
