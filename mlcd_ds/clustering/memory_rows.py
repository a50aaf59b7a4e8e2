"""Rows in memory, a slice a rank, and their clustering: the best of several starts.

N rows of this rank, C centres, B rows of a block, K chosen rows, E width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mlcd_ds.clustering.choose_assigner import choose_assigner, resolve_precision
from mlcd_ds.clustering.first_centers import first_centers
from mlcd_ds.clustering.kmeans import Clustering, Phase, Rules, kmeans
from mlcd_ds.clustering.label_pass import label_rows
from mlcd_ds.clustering.repair import Repair
from mlcd_ds.clustering.row_sampling import Sample
from mlcd_ds.distributed.collectives import Group

MOVING_ITERATIONS, SETTLING_ITERATIONS = 10, 5  # as `mlcd cluster` has them

LEAST_GAIN = 1e-5  # of the mean squared distance, by which a later start must be better


@dataclass(frozen=True)
class Share:
    """Of `num_rows` rows of all ranks, those of one: [first, first + count). `per_rank` is the largest count."""

    num_rows: int
    first: int
    count: int
    per_rank: int

    @classmethod
    def of(cls, num_rows: int, group: Group) -> Share:
        """This rank's. All ranks but the last have as many, or none."""
        per_rank = -(-num_rows // group.size)
        first = min(group.rank * per_rank, num_rows)
        return cls(num_rows, first, min(per_rank, num_rows - first), per_rank)

    @property
    def padded(self) -> np.ndarray:
        """int64 [per_rank]: the numbers of the rows; the last row of all stands where some are lacking, so that every
        rank has as many."""
        return np.minimum(np.arange(self.first, self.first + self.per_rank), self.num_rows - 1)

    def gather(self, own_N: Tensor, group: Group) -> Tensor:
        """[num_rows, ...] on every rank, of [N, ...] on each. One all-gather."""
        padded = own_N.new_zeros((self.per_rank, *own_N.shape[1:]))
        padded[: self.count] = own_N
        return group.all_gather(padded)[: self.num_rows]


class MemoryRows:
    """K-means' `Rows` over a tensor [N, E] of this rank."""

    def __init__(self, rows_NE: Tensor, share: Share) -> None:
        assert len(rows_NE) == share.count
        self._rows_NE, self._share = rows_NE, share
        self.num_rows, self.dim = share.num_rows, rows_NE.shape[1]

    def blocks(self, block_rows: int, sample: Sample | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's rows, or those in a sample: global numbers int64 [B], and rows [B, E]."""
        numbers_N = np.arange(self._share.first, self._share.first + self._share.count)
        rows_NE = self._rows_NE
        if sample is not None:
            numbers_N = numbers_N[sample.contains(numbers_N)]
            rows_NE = rows_NE[torch.from_numpy(numbers_N - self._share.first).to(rows_NE.device)]
        for begin in range(0, len(numbers_N), block_rows):
            block = slice(begin, begin + block_rows)
            yield torch.from_numpy(numbers_N[block]), rows_NE[block]

    def numbers(self, places_K: np.ndarray) -> np.ndarray:
        """No row is left out: the places themselves."""
        return places_K

    def pick(self, numbers_K: np.ndarray) -> Tensor:
        """fp32 [K, E]: the given global rows where this rank has them, zero elsewhere."""
        places_K = numbers_K - self._share.first
        here_K = (places_K >= 0) & (places_K < self._share.count)
        device = self._rows_NE.device
        picked_KE = torch.zeros(len(numbers_K), self.dim, device=device)
        wanted = torch.from_numpy(places_K[here_K]).to(device)
        picked_KE[torch.from_numpy(here_K).to(device)] = self._rows_NE[wanted].float()
        return picked_KE

    def place(self, number: int) -> str:
        """How a message names a row."""
        return f"row {number}"


def cluster_rows(
    rows_NE: Tensor, share: Share, group: Group, num_centers: int, num_iterations: int, seeds: list[int]
) -> tuple[Clustering, Tensor]:
    """Euclidean k-means from several starts: the first clustering of smallest mean squared distance, and this rank's
    labels int64 [N]. The same centres on all ranks of the group. Collectives: those of `first_centers` and `kmeans`."""
    rows, device = MemoryRows(rows_NE, share), rows_NE.device
    is_bf16 = resolve_precision("auto", device, float(share.num_rows) * num_centers * rows.dim)
    assigner = choose_assigner("auto", "euclidean", device, is_bf16)

    def run(seed: int) -> Clustering:
        first_CE = first_centers(
            "auto",
            rows,
            group,
            num_centers,
            "euclidean",
            seed,
            lambda: choose_assigner("auto", "euclidean", device, is_bf16),
            device,
        )
        moving = max(0, min(MOVING_ITERATIONS, num_iterations - SETTLING_ITERATIONS))
        rules = Rules("euclidean", (Phase(1.0, num_iterations),), 0.0, Repair("euclidean"), seed, moving)
        return kmeans(rows, group, assigner, Clustering(first_CE, np.zeros(num_centers, np.int64)), rules)

    best = run(seeds[0])
    for seed in seeds[1:]:
        other = run(seed)
        # By more than rounding, which differs with the number of ranks: several starts may well end at the same.
        if other.objective[-1] < best.objective[-1] * (1 - LEAST_GAIN):
            best = other
    assigner.set_centers(best.centers_CE)
    labels_N1, _ = label_rows(assigner, rows_NE, 1, "euclidean", device=device)
    return best, torch.from_numpy(labels_N1[:, 0]).long().to(device)
