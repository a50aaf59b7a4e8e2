"""Which rows belong to a sample: a function of (seed, row) alone, so every number of ranks draws the same.

N rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def uniforms(rows_N: np.ndarray, seed: int) -> np.ndarray:
    """float64 [N] in [0, 1) for global row numbers: the mixing function of SplitMix64 (Steele et al., 2014)."""
    with np.errstate(over="ignore"):
        x = rows_N.astype(np.uint64) + np.uint64(seed % 2**32) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class Sample:
    """About `rate` of all rows. A sample of a higher rate and the same seed contains it."""

    rate: float
    seed: int

    def contains(self, rows_N: np.ndarray) -> np.ndarray:
        """bool [N]."""
        return uniforms(rows_N, self.seed) < self.rate
