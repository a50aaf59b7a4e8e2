"""First centres: random rows, k-means++, or two levels. The same on any number of ranks, up to rounding.

C centres, N rows of this rank's sample, K chosen rows, B rows of a block, E width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlcd_ds.clustering.assigner import Assigner, Metric
from mlcd_ds.clustering.kmeans import BLOCK_ROWS, Clustering, Phase, Rows, Rules, kmeans
from mlcd_ds.clustering.repair import Repair, RepairByCell
from mlcd_ds.clustering.row_sampling import Sample, uniforms
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.errors import UserError

InitName = Literal["auto", "random", "kmeans++", "two_level"]
AUTO_TWO_LEVEL = 20_000  # centres from which two levels pay
PLUS_POINTS = 16  # rows a centre that k-means++ draws from
CELL_POINTS, CELL_ITERATIONS = 256, 10  # rows a cell and iterations of the first level
CANDIDATES = 4  # rows a centre from which the second level's first centres come
FINE_POINTS, FINE_ITERATIONS = 40, 8
SCORES_AT_ONCE = 2**22

MakeAssigner = Callable[[], Assigner]


def first_centers(
    name: InitName,
    rows: Rows,
    group: Group,
    num_centers: int,
    metric: Metric,
    seed: int,
    make_assigner: MakeAssigner,
    device: torch.device | str = "cpu",
) -> Tensor:
    """fp32 [C, E] on `device`, by `--init`. Raises UserError when there are fewer rows than centres."""
    if num_centers > rows.num_rows:
        raise UserError(f"--num-centers {num_centers} is more than the {rows.num_rows} images: choose fewer.")
    if name == "two_level" or (name == "auto" and num_centers >= AUTO_TWO_LEVEL):
        return two_level_centers(rows, group, num_centers, metric, seed, make_assigner, torch.device(device))
    if name == "kmeans++":
        return plus_plus_centers(rows, group, num_centers, metric, seed, torch.device(device))
    return random_centers(rows, group, num_centers, metric, seed).to(device)


def random_centers(rows: Rows, group: Group, num_centers: int, metric: Metric, seed: int) -> Tensor:
    """`num_centers` different rows, drawn by the seed alone. Collective: one all-reduce of [C, E]."""
    chosen_K = np.random.default_rng(seed).choice(rows.num_rows, num_centers, replace=False, shuffle=False)
    return gather_rows(rows, group, chosen_K, metric)


def gather_rows(rows: Rows, group: Group, numbers_K: np.ndarray, metric: Metric) -> Tensor:
    """fp32 [K, E] on every rank, of unit length for the cosine. Collective: one all-reduce of [K, E]."""
    rows_KE = group.all_reduce_sum(rows.pick(numbers_K))
    return F.normalize(rows_KE, dim=1) if metric == "cosine" else rows_KE


def plus_plus_centers(
    rows: Rows, group: Group, num_centers: int, metric: Metric, seed: int, device: torch.device
) -> Tensor:
    """k-means++ (Arthur & Vassilvitskii, 2007) over a sample of PLUS_POINTS rows a centre, held in memory.

    Each centre is a row drawn with a probability proportional to its squared distance from the nearest centre so far.
    Collectives for each: an all-gather of a number, an all-reduce of [E]. For some thousands of centres at most.
    """
    rate = PLUS_POINTS * num_centers / rows.num_rows
    sample = Sample(rate, seed) if rate < 1 else None
    blocks = [rows_BE.to(device).float() for _, rows_BE in rows.blocks(BLOCK_ROWS, sample)]
    rows_NE = torch.cat(blocks) if blocks else torch.zeros(0, rows.dim, device=device)
    if metric == "cosine":
        rows_NE = F.normalize(rows_NE, dim=1)
    squares_N = rows_NE.square().sum(dim=1)
    weights_N = torch.ones(len(rows_NE), dtype=torch.float64, device=device)
    centers_CE = torch.empty(num_centers, rows.dim, device=device)
    generator = np.random.default_rng(seed)
    for center in range(num_centers):
        sums_R = group.all_gather(weights_N.sum()[None]).cpu()
        # A point on the line of all ranks' weights; the last rank also takes what rounding puts behind its end.
        ends_R = sums_R.cumsum(0)
        point = float(generator.random()) * float(ends_R[-1])
        owner = min(int(torch.searchsorted(ends_R, point, right=True)), int(sums_R.nonzero()[-1]))
        row_E = torch.zeros(rows.dim, device=device)
        if owner == group.rank:
            place = torch.searchsorted(weights_N.cumsum(0), point - float(ends_R[owner] - sums_R[owner]), right=True)
            row_E = rows_NE[min(int(place), len(rows_NE) - 1)]
        centers_CE[center] = group.all_reduce_sum(row_E.clone())
        row_E = centers_CE[center]
        distances_N = (squares_N - 2 * (rows_NE @ row_E) + row_E.square().sum()).clamp_min(1e-12).double()
        weights_N = distances_N if center == 0 else torch.minimum(weights_N, distances_N)
    return centers_CE


def two_level_centers(
    rows: Rows,
    group: Group,
    num_centers: int,
    metric: Metric,
    seed: int,
    make_assigner: MakeAssigner,
    device: torch.device,
) -> Tensor:
    """About sqrt(C) cells, then centres within each in proportion to its rows; both levels by k-means on samples.

    A row is compared with the cells and with the centres of its own cell: 2 sqrt(C) products instead of C. Collectives:
    those of k-means at both levels, and one gather of CANDIDATES cell numbers a centre.
    """
    num_cells = max(1, round(num_centers**0.5))
    rate = min(1.0, CELL_POINTS * num_cells / rows.num_rows)
    rules = Rules(metric, (Phase(rate, CELL_ITERATIONS),), 1e-3, Repair(metric), seed, CELL_ITERATIONS // 2)
    start = random_centers(rows, group, num_cells, metric, seed).to(device)
    cells = make_assigner()
    cells_CE = kmeans(rows, group, cells, Clustering(start, np.zeros(num_cells, np.int64)), rules).centers_CE
    cells.set_centers(cells_CE)
    numbers_N, cells_N = _candidates(rows, group, cells, num_centers, seed + 1)
    kept, cells_N = np.unique(cells_N, return_inverse=True)  # a cell without a candidate is none
    cells.set_centers(cells_CE[torch.from_numpy(kept).to(device)])
    counts_C = shares(np.bincount(cells_N), num_centers)
    order_N = np.lexsort((uniforms(numbers_N, seed + 2), cells_N))
    rank_in_cell_N = np.arange(len(order_N)) - np.searchsorted(cells_N[order_N], cells_N[order_N])
    chosen_K = numbers_N[order_N][rank_in_cell_N < counts_C[cells_N[order_N]]]
    bounds = np.concatenate([[0], np.cumsum(counts_C)])
    start = gather_rows(rows, group, chosen_K, metric).to(device)
    rate = min(1.0, FINE_POINTS * num_centers / rows.num_rows)
    rules = Rules(
        metric, (Phase(rate, FINE_ITERATIONS),), 1e-3, RepairByCell(metric, bounds), seed, FINE_ITERATIONS // 2
    )
    within = WithinCells(cells, bounds, metric)
    return kmeans(rows, group, within, Clustering(start, np.zeros(num_centers, np.int64)), rules).centers_CE


def _candidates(
    rows: Rows, group: Group, cells: Assigner, num_centers: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Global numbers int64 [N] of some rows, at least `num_centers`, and their cells [N], on every rank."""
    rate = CANDIDATES * num_centers / rows.num_rows
    while True:
        sample = Sample(rate, seed) if rate < 1 else None
        numbers, found = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for numbers_B, rows_BE in rows.blocks(BLOCK_ROWS, sample):
            numbers.append(numbers_B.numpy())
            found.append(cells.search(rows_BE.float(), 1)[1][:, 0].cpu().numpy())
        parts = group.gather_objects((np.concatenate(numbers), np.concatenate(found)))
        numbers_N, cells_N = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        if len(numbers_N) >= num_centers:
            return numbers_N, cells_N
        rate *= 2  # a small sample may fall short of what was expected


def shares(counts_C: np.ndarray, total: int) -> np.ndarray:
    """int64 like `counts_C`: parts of `total`, in proportion, none above its count, at least 1 where that is not 0."""
    parts_C = np.minimum(counts_C, 1).astype(np.int64)
    while (left := total - parts_C.sum()) > 0:
        room_C = counts_C - parts_C
        wanted_C = left * room_C / room_C.sum()
        added_C = np.minimum(np.floor(wanted_C).astype(np.int64), room_C)
        if not added_C.any():
            added_C[np.argsort(-wanted_C, kind="stable")[:left]] = 1
        parts_C += added_C
    return parts_C


class WithinCells:
    """An assigner for the second level: the nearest centre among those of a row's own cell.

    Cell i has the centres [bounds[i], bounds[i + 1]); `cells` finds a row's cell.
    """

    def __init__(self, cells: Assigner, bounds: np.ndarray, metric: Metric) -> None:
        self._cells, self._bounds, self._metric = cells, bounds, metric

    def set_centers(self, centers_CE: Tensor) -> None:
        self._centers_CE = centers_CE

    def search(self, rows_BE: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores fp32 [B, 1] and centres int64 [B, 1]."""
        assert k == 1, "the second level has one centre a row"
        cell_B = self._cells.search(rows_BE, 1)[1][:, 0].to(rows_BE.device)
        order_B = cell_B.argsort(stable=True)
        found, counts = torch.unique_consecutive(cell_B[order_B], return_counts=True)
        scores_B = torch.empty(len(rows_BE), device=rows_BE.device)
        nearest_B = torch.empty(len(rows_BE), dtype=torch.int64, device=rows_BE.device)
        begin = 0
        for cell, count in zip(found.tolist(), counts.tolist(), strict=True):
            first, end = int(self._bounds[cell]), int(self._bounds[cell + 1])
            centers_cE = self._centers_CE[first:end]
            for part in order_B[begin : begin + count].split(max(1, SCORES_AT_ONCE // max(1, end - first))):
                scores_bc = rows_BE[part] @ centers_cE.T
                if self._metric == "euclidean":
                    scores_bc -= centers_cE.square().sum(dim=1) / 2
                best_b, place_b = scores_bc.max(dim=1)
                scores_B[part], nearest_B[part] = best_b, first + place_b
            begin += count
        return scores_B[:, None], nearest_B[:, None]
