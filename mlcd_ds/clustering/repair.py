"""Clusters that are empty, too small or too large: dissolved, or split, the same way on every rank.

C centres, E width.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SPLIT_STEP = 1e-3  # of the centre's length


@dataclass(frozen=True)
class SizeLimits:
    """Smallest and largest number of rows that a cluster should have. Empty clusters are always repaired.

    Limits are aims of every iteration's repair, not a constraint of the assignment: what is left is reported.
    """

    min_size: float = 1
    max_size: float | None = None

    def __call__(self, centers_CE: Tensor, counts_C: np.ndarray, rate: float, generator: np.random.Generator) -> int:
        """Repair in place, from counts over a `rate` of all rows; returns the number of splits.

        A cluster below the minimum gives up its centre, which becomes one half of the largest cluster: both move a
        small step apart. Then the largest are split while they are above the maximum, each at the cost of the smallest.
        """
        smallest, largest_allowed = max(1, self.min_size * rate), (self.max_size or np.inf) * rate
        if counts_C.min() >= smallest and counts_C.max() <= largest_allowed:
            return 0
        splits = _Splits(centers_CE, counts_C, generator)
        for center in np.flatnonzero(counts_C < smallest).tolist():
            if counts_C[center] == 0 or splits.largest_count() >= 2 * smallest:
                splits.split_largest(center)
        for center in np.argsort(counts_C, kind="stable").tolist():
            # A small cluster is given up only where that leaves the sizes more even than they were.
            if splits.largest_count() <= largest_allowed or counts_C[center] >= splits.largest_count() / 2:
                break
            splits.split_largest(center)
        return splits.number


@dataclass(frozen=True)
class ByCell:
    """Repairs within cells of centres, [bounds[i], bounds[i + 1]), each by itself."""

    bounds: np.ndarray

    def __call__(self, centers_CE: Tensor, counts_C: np.ndarray, rate: float, generator: np.random.Generator) -> int:
        """Repair empty clusters in place; returns the number of splits."""
        cells = np.unique(np.searchsorted(self.bounds, np.flatnonzero(counts_C == 0), side="right") - 1)
        slices = [slice(self.bounds[cell], self.bounds[cell + 1]) for cell in cells]
        return sum(SizeLimits()(centers_CE[part], counts_C[part], rate, generator) for part in slices)


class _Splits:
    """Halves the largest cluster, again and again, in O(log C)."""

    def __init__(self, centers_CE: Tensor, counts_C: np.ndarray, generator: np.random.Generator) -> None:
        self._centers_CE, self._counts_C, self._generator = centers_CE, counts_C, generator
        self._by_size = [(-count, center) for center, count in enumerate(counts_C.tolist())]
        heapq.heapify(self._by_size)
        self.number = 0

    def largest_count(self) -> int:
        """Rows of the largest cluster."""
        while -self._by_size[0][0] != self._counts_C[self._by_size[0][1]]:
            heapq.heappop(self._by_size)  # a size that was
        return -self._by_size[0][0]

    def split_largest(self, center: int) -> None:
        """Let `center` take one half of the largest cluster. The centres' lengths stay as they are."""
        self.largest_count()
        largest = heapq.heappop(self._by_size)[1]
        whole_E = self._centers_CE[largest].clone()
        length = whole_E.norm()
        step_E = torch.from_numpy(self._generator.standard_normal(len(whole_E)).astype(np.float32)).to(whole_E.device)
        step_E *= SPLIT_STEP * length / step_E.norm()
        for half, moved_E in ((center, whole_E + step_E), (largest, whole_E - step_E)):
            self._centers_CE[half] = moved_E * (length / moved_E.norm().clamp_min(1e-12))
        self._counts_C[center] = self._counts_C[largest] // 2
        self._counts_C[largest] -= self._counts_C[center]
        for half in (center, largest):
            heapq.heappush(self._by_size, (-int(self._counts_C[half]), half))
        self.number += 1
