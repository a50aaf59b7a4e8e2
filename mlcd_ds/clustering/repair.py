"""Clusters that are empty, too small, too large, or cost too little: their centres move, in the same way on every rank.

C centres, M that move, E width. The *spread* of a cluster is the sum of its rows' squared distances from the centre. In
an optimal clustering all spreads are about equal (Gersho, 1979), while Lloyd's iterations cannot carry a centre across
the space: centres of small spread are therefore taken away and split the clusters of largest spread.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlcd_ds.clustering.assigner import Metric

MOVED_SHARE = 0.04  # of all centres, at most, in an iteration
MOVED_RATIO = 0.05  # a centre moves when its cluster has less than this share of the other's spread
SPLIT_STEP = 0.5  # of a cluster's root mean square distance: docs/log.md compares steps
LEAST_STEP = 1e-3  # of the centre's length, where all rows of a cluster are copies


@dataclass
class Clusters:
    """What a repair reads and changes: centres fp32 [C, E], rows int64 [C] and spreads float64 [C] of clusters."""

    centers_CE: Tensor
    counts_C: np.ndarray
    spreads_C: np.ndarray

    def split(self, moved_M: np.ndarray, split_M: np.ndarray, metric: Metric, generator: np.random.Generator) -> None:
        """Each moved centre takes one half of its partner's cluster: the two step apart in a random direction."""
        if not len(moved_M):
            return
        device = self.centers_CE.device
        moved, partners = torch.from_numpy(moved_M).to(device), torch.from_numpy(split_M).to(device)
        whole_ME = self.centers_CE[partners]
        noise_ME = generator.standard_normal(whole_ME.shape, dtype=np.float32)
        radius_M = torch.from_numpy(np.sqrt(self.spreads_C[split_M] / np.maximum(1, self.counts_C[split_M])))
        step_M = torch.maximum(SPLIT_STEP * radius_M.to(device), LEAST_STEP * whole_ME.norm(dim=1))
        step_ME = F.normalize(torch.from_numpy(noise_ME).to(device), dim=1) * step_M.float()[:, None]
        for place, halves_ME in ((moved, whole_ME + step_ME), (partners, whole_ME - step_ME)):
            self.centers_CE[place] = F.normalize(halves_ME, dim=1) if metric == "cosine" else halves_ME
        for values_C in (self.counts_C, self.spreads_C):
            halves_M = values_C[split_M] // 2 if values_C is self.counts_C else values_C[split_M] / 2
            values_C[moved_M] = halves_M
            values_C[split_M] -= halves_M


@dataclass(frozen=True)
class Repair:
    """Smallest and largest number of rows that a cluster should have. Empty clusters are always repaired.

    Every iteration's repair aims at the limits; they do not constrain the assignment. What remains is reported.
    """

    metric: Metric
    min_size: float = 1
    max_size: float | None = None

    def __call__(self, clusters: Clusters, rate: float, may_move: bool, generator: np.random.Generator) -> int:
        """Repair in place, from counts over a `rate` of all rows; returns how many clusters were split.

        Empty clusters, and with `may_move` those of small spread, split the ones of largest spread. Clusters below the
        minimum split the ones with most rows, and so do the smallest while there are clusters above the maximum.
        """
        counts_C, spreads_C = clusters.counts_C, clusters.spreads_C
        order_C = np.lexsort((spreads_C, counts_C > 0))
        at_most = max(int((counts_C == 0).sum()), int(MOVED_SHARE * len(counts_C)) if may_move else 0)
        low_M, high_M = order_C[: min(at_most, len(order_C) // 2)], order_C[::-1]
        high_M = high_M[: len(low_M)]
        wanted_M = (counts_C[low_M] == 0) | (spreads_C[low_M] < MOVED_RATIO * spreads_C[high_M])
        low_M, high_M = low_M[wanted_M], high_M[wanted_M]
        clusters.split(low_M, high_M, self.metric, generator)
        return len(low_M) + self._even_out(clusters, rate, generator)

    def _even_out(self, clusters: Clusters, rate: float, generator: np.random.Generator) -> int:
        """Bring sizes towards their limits, in pairs of the smallest and the largest."""
        counts_C = clusters.counts_C
        smallest, largest = self.min_size * rate, (self.max_size or np.inf) * rate
        order_C = np.argsort(counts_C, kind="stable")
        low_M, high_M = order_C[: len(order_C) // 2], order_C[::-1][: len(order_C) // 2]
        # A cluster is given up only where that leaves sizes more even than they were.
        is_small_M = (counts_C[low_M] < smallest) & (counts_C[high_M] >= 2 * smallest)
        is_large_M = (counts_C[high_M] > largest) & (counts_C[low_M] < counts_C[high_M] / 2)
        wanted_M = is_small_M | is_large_M
        clusters.split(low_M[wanted_M], high_M[wanted_M], self.metric, generator)
        return int(wanted_M.sum())


@dataclass(frozen=True)
class RepairByCell:
    """Repairs within cells of centres, [bounds[i], bounds[i + 1]), each by itself."""

    metric: Metric
    bounds: np.ndarray

    def __call__(self, clusters: Clusters, rate: float, may_move: bool, generator: np.random.Generator) -> int:
        """Repair in place; returns how many clusters were split."""
        num_splits = 0
        for begin, end in zip(self.bounds[:-1].tolist(), self.bounds[1:].tolist(), strict=True):
            part = (clusters.centers_CE[begin:end], clusters.counts_C[begin:end], clusters.spreads_C[begin:end])
            num_splits += Repair(self.metric)(Clusters(*part), rate, may_move, generator)
        return num_splits
