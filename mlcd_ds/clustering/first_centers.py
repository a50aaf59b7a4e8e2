"""First centres: random rows, greedy k-means++, or two levels. The same on any number of ranks, up to rounding.

C centres, N rows of a sample, K chosen rows or projected width, F = K + 1, D draws of T candidates, B rows of a block,
E width.
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
AUTO_RANDOM, AUTO_TWO_LEVEL = 1_000, 20_000  # k-means++ up to the first number of centres, two levels from the second
PLUS_POINTS, PLUS_ROWS = 16, 16_384  # rows that k-means++ draws from: so many a centre, and at least so many
PLUS_DIM, PLUS_CANDIDATES = 128, 6  # width in which it measures; candidates, over scikit-learn's 2 + log C
PLUS_PICKS = 3  # centres that are picked from a draw of candidates
LEAST_DISTANCE = 1e-12  # floor, so that any row may be drawn where all rows are copies of centres
CELL_POINTS, CELL_ITERATIONS = 256, 10  # rows a cell and iterations of the first level
CANDIDATES = 4  # rows a centre from which the second level's first centres come
FINE_POINTS, FINE_ITERATIONS = 40, 8
SCORES_AT_ONCE = 2**22

MakeAssigner = Callable[[], Assigner]


def resolve_init(name: InitName, num_centers: int) -> InitName:
    """Resolve `auto` by the number of centres; docs/clustering.md compares the methods."""
    if name != "auto":
        return name
    if num_centers >= AUTO_TWO_LEVEL:
        return "two_level"
    return "kmeans++" if num_centers <= AUTO_RANDOM else "random"


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
    name = resolve_init(name, num_centers)
    if name == "two_level":
        return two_level_centers(rows, group, num_centers, metric, seed, make_assigner, torch.device(device))
    if name == "kmeans++":
        return plus_plus_centers(rows, group, num_centers, metric, seed, torch.device(device))
    return random_centers(rows, group, num_centers, metric, seed).to(device)


def random_centers(rows: Rows, group: Group, num_centers: int, metric: Metric, seed: int) -> Tensor:
    """`num_centers` different rows, drawn by the seed alone. Collective: one all-reduce of [C, E]."""
    chosen_K = np.random.default_rng(seed).choice(rows.num_rows, num_centers, replace=False, shuffle=False)
    return gather_rows(rows, group, rows.numbers(chosen_K), metric)


def gather_rows(rows: Rows, group: Group, numbers_K: np.ndarray, metric: Metric) -> Tensor:
    """fp32 [K, E] on every rank, of unit length for the cosine. Collective: one all-reduce of [K, E]."""
    rows_KE = group.all_reduce_sum(rows.pick(numbers_K))
    return F.normalize(rows_KE, dim=1) if metric == "cosine" else rows_KE


def plus_plus_centers(
    rows: Rows, group: Group, num_centers: int, metric: Metric, seed: int, device: torch.device
) -> Tensor:
    """Greedy k-means++ (Arthur & Vassilvitskii, 2007) over a sample of rows, seen in a random projection.

    The projection keeps distances to some percent (Johnson & Lindenstrauss, 1984), a loss that the larger number of
    candidates outweighs. It is small enough for every rank to hold all of it, so each makes all draws. Collectives: two
    exchanges of the sample (numbers, and PLUS_DIM fp32 a row), an all-gather of [C], an all-reduce of [C, E].
    """
    generator = np.random.default_rng(seed)
    kept_dim = min(rows.dim, PLUS_DIM)
    noise_EK = generator.standard_normal((rows.dim, kept_dim), dtype=np.float32) / kept_dim**0.5
    projection_EK = torch.from_numpy(noise_EK).to(device)
    rate = max(PLUS_POINTS * num_centers, PLUS_ROWS) / rows.num_rows
    sample = Sample(rate, seed) if rate < 1 else None
    numbers, parts = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, kept_dim, device=device)]
    for numbers_B, stored_BE in rows.blocks(BLOCK_ROWS, sample):
        rows_BE = stored_BE.to(device).float()
        if metric == "cosine":
            rows_BE = F.normalize(rows_BE, dim=1)
        numbers.append(numbers_B)
        parts.append(rows_BE @ projection_EK)
    numbers_N = group.exchange([torch.cat(numbers).to(device)] * group.size)
    points_NK = group.exchange([torch.cat(parts)] * group.size)
    chosen_C = numbers_N[draw_far_apart(points_NK, num_centers, generator)]
    # Rank 0's choice, should another rank's processor round differently.
    chosen_C = group.all_gather(chosen_C)[:num_centers]
    return gather_rows(rows, group, chosen_C.cpu().numpy(), metric).to(device)


def draw_far_apart(points_NK: Tensor, num_centers: int, generator: np.random.Generator) -> Tensor:
    """Places int64 [C] of points [N, K]: of T candidates, each drawn in proportion to its squared distance from the
    nearest point so far, the one that leaves the smallest sum of those distances; then, of the same candidates, the one
    that does so beside it, up to PLUS_PICKS of a draw. The first comes from a draw of its own.
    """
    num_candidates = PLUS_CANDIDATES * (2 + int(np.log(num_centers)))
    num_draws = 1 + -(-(num_centers - 1) // PLUS_PICKS)
    draws_DT = torch.from_numpy(generator.random((num_draws, num_candidates))).to(points_NK.device)
    squares_N = points_NK.square().sum(dim=1)
    # [x, 1] . [2 c, -|c|^2] = |x|^2 - |x - c|^2
    rows_FN = torch.cat([points_NK, torch.ones_like(squares_N)[:, None]], dim=1).T.contiguous()
    factors_NF = torch.cat([2 * points_NK, -squares_N[:, None]], dim=1)
    nearest_N = (4 * squares_N.max()).expand(len(squares_N))  # squared distance from the nearest so far; none is larger
    chosen: list[Tensor] = []
    for draws_T in draws_DT:
        ends_N = nearest_N.double().cumsum(0)
        places_T = torch.searchsorted(ends_N, draws_T * ends_N[-1], right=True).clamp_max(len(squares_N) - 1)
        lead_TN = torch.addmm(nearest_N - squares_N, factors_NF[places_T], rows_FN)  # by which a candidate is nearer
        for _ in range(min(PLUS_PICKS if chosen else 1, num_centers - len(chosen))):
            best = lead_TN.clamp_min(0).sum(dim=1).argmax()
            chosen.append(places_T[best])
            gain_N = lead_TN[best].clamp_min(0)
            nearest_N = (nearest_N - gain_N).clamp_min(LEAST_DISTANCE)
            lead_TN -= gain_N
    return torch.stack(chosen)


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
    kept, cells_N = np.unique(cells_N, return_inverse=True)  # cells without a candidate are dropped
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

    def search(self, rows_BE: Tensor, k: int, squares_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
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
