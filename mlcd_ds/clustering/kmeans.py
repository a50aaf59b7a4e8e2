"""Spherical k-means over the rows of all ranks: Lloyd's iterations on unit vectors with unit centres (paper, 3.2).

Each rank assigns its own rows; sums and counts are added over the ranks, so every rank holds the same centres and the
result depends on the number of ranks only through the rounding of the sums. C centres, E width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from mlcd_ds.clustering.assigners import Assigner
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.errors import UserError

BLOCK_ROWS = 65_536
SPLIT_STEP = 1e-3


class Rows(Protocol):
    """The little that k-means asks of its data: one rank's slice of all rows."""

    num_rows: int  # of all ranks
    dim: int

    def blocks(self, block_rows: int) -> Iterator[np.ndarray]:
        """This rank's rows, as fp32 blocks."""

    def pick(self, rows_K: np.ndarray) -> np.ndarray:
        """The given global rows where this rank has them, zero elsewhere."""


@dataclass(frozen=True)
class Clustering:
    """Unit centres fp32 [C, E]; rows per centre int64 [C] and mean similarity to the own centre, an entry an
    iteration, both as assigned in that iteration; clusters that had to be split for empty ones, likewise."""

    centers_CE: np.ndarray
    counts_C: np.ndarray
    objective: tuple[float, ...] = ()
    num_splits: tuple[int, ...] = ()

    @property
    def num_iterations(self) -> int:
        return len(self.objective)


def unit(rows_NE: np.ndarray) -> np.ndarray:
    """Rows scaled to length one; zero rows stay zero."""
    return rows_NE / np.maximum(np.linalg.norm(rows_NE, axis=1, keepdims=True), 1e-12)


def initial_clustering(rows: Rows, group: Group, num_centers: int, seed: int) -> Clustering:
    """`num_centers` different rows, drawn by the seed alone. Collective: one all-reduce of [C, E]."""
    if num_centers > rows.num_rows:
        raise UserError(f"--num-centers {num_centers} is more than the {rows.num_rows} images: choose fewer.")
    chosen = np.random.default_rng(seed).choice(rows.num_rows, num_centers, replace=False, shuffle=False)
    centers_CE = group.all_reduce_sum(torch.from_numpy(rows.pick(chosen))).numpy()
    return Clustering(unit(centers_CE), np.zeros(num_centers, dtype=np.int64))


def iterate(rows: Rows, group: Group, assigner: Assigner, current: Clustering, seed: int) -> Clustering:
    """One iteration: assign, average, normalise, split. Collectives: all-reduce of [C, E], [C] and the objective."""
    num_centers, dim = current.centers_CE.shape
    sums_CE, counts_C = torch.zeros(num_centers, dim), torch.zeros(num_centers, dtype=torch.int64)
    total = torch.zeros(1, dtype=torch.float64)
    assigner.set_centers(current.centers_CE)
    for block_BE in rows.blocks(BLOCK_ROWS):
        similarity_B1, nearest_B1 = assigner.search(block_BE, 1)
        nearest_B = torch.from_numpy(nearest_B1[:, 0])
        sums_CE.index_add_(0, nearest_B, torch.from_numpy(block_BE))
        counts_C += torch.bincount(nearest_B, minlength=num_centers)
        total += float(similarity_B1.sum(dtype=np.float64))
    for values in (sums_CE, counts_C, total):
        group.all_reduce_sum(values)
    centers_CE = unit(sums_CE.numpy())
    seed_now = [seed, current.num_iterations]
    num_splits = split_largest(centers_CE, counts_C.numpy().copy(), np.random.default_rng(seed_now))
    return Clustering(
        centers_CE,
        counts_C.numpy(),
        (*current.objective, float(total) / rows.num_rows),
        (*current.num_splits, num_splits),
    )


def split_largest(centers_CE: np.ndarray, counts_C: np.ndarray, generator: np.random.Generator) -> int:
    """Give every empty cluster one half of the largest: both move a small step apart. Returns the number of splits.

    In place; the same on every rank, because the counts and the generator are.
    """
    empty = np.flatnonzero(counts_C == 0)
    for center in empty:
        largest = int(counts_C.argmax())
        step_E = generator.standard_normal(centers_CE.shape[1]).astype(np.float32)
        step_E *= SPLIT_STEP / np.linalg.norm(step_E)
        centers_CE[center] = unit((centers_CE[largest] + step_E)[None])[0]
        centers_CE[largest] = unit((centers_CE[largest] - step_E)[None])[0]
        counts_C[center] = counts_C[largest] // 2
        counts_C[largest] -= counts_C[center]
    return len(empty)


def kmeans(
    rows: Rows,
    group: Group,
    assigner: Assigner,
    start: Clustering,
    num_iterations: int,
    seed: int,
    after_iteration: Callable[[Clustering], None],
) -> Clustering:
    """Iterate from `start` (fresh, or a saved state) until `num_iterations` are done."""
    current = start
    while current.num_iterations < num_iterations:
        current = iterate(rows, group, assigner, current, seed)
        after_iteration(current)
    return current
