"""Lloyd's iterations over the rows of all ranks (paper, 3.2): assign, average by range of centres, repair.

Each rank assigns its own rows. Sums are reduce-scattered by ranges of centres, averaged there, and gathered again;
so every rank holds the same centres, and the result depends on the number of ranks only through the rounding of the
sums. It knows data and search only by two small interfaces, `Rows` and `Assigner`.

C centres, L = ceil(C / R) centres of this rank's range, B rows of a block, E width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlcd_ds.clustering.assigner import Assigner, Metric
from mlcd_ds.clustering.repair import Clusters
from mlcd_ds.clustering.row_sampling import Sample
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.errors import UserError

BLOCK_ROWS = 65_536


class Rows(Protocol):
    """What k-means needs of its data: one rank's slice of all rows."""

    num_rows: int  # of all ranks
    dim: int

    def blocks(self, block_rows: int, sample: Sample | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's rows, or those in a sample: global numbers int64 [B], and rows [B, E] of any floating type."""

    def numbers(self, places_K: np.ndarray) -> np.ndarray:
        """Global numbers of the rows at these places among the `num_rows`: others where rows were left out."""

    def pick(self, numbers_K: np.ndarray) -> Tensor:
        """fp32 [K, E]: the given global rows where this rank has them, zero elsewhere."""

    def place(self, number: int) -> str:
        """Where one of this rank's rows is stored."""


@dataclass(frozen=True)
class Phase:
    """At most `num_iterations` iterations on a share `rate` of the rows."""

    rate: float
    num_iterations: int


@dataclass(frozen=True)
class Iteration:
    """What an iteration did. `objective`, over the rows that it read: the mean cosine of a row to its centre, or the
    mean squared distance; `num_splits`: clusters that were split, for others that were empty, small or cheap."""

    phase: int
    objective: float
    num_rows: int
    num_splits: int


@dataclass(frozen=True)
class Clustering:
    """Centres fp32 [C, E], rows per centre int64 [C] as the last iteration assigned them, and all iterations."""

    centers_CE: Tensor
    counts_C: np.ndarray
    history: tuple[Iteration, ...] = ()

    @property
    def objective(self) -> tuple[float, ...]:
        return tuple(iteration.objective for iteration in self.history)

    @property
    def num_splits(self) -> tuple[int, ...]:
        return tuple(iteration.num_splits for iteration in self.history)

    @property
    def num_iterations(self) -> int:
        return len(self.history)


# `repair(clusters, rate, may_move, generator)` changes clusters of a share of all rows in place; returns the splits.
RepairRule = Callable[[Clusters, float, bool, np.random.Generator], int]


@dataclass(frozen=True)
class Rules:
    """How to iterate: the metric, the phases, when a phase ends early, how clusters are repaired, the seed, and in how
    many of the first iterations centres may move from cheap clusters to expensive ones."""

    metric: Metric
    phases: tuple[Phase, ...]
    tolerance: float
    repair: RepairRule
    seed: int
    moving_iterations: int = 0


def distortion(objective: float, metric: Metric) -> float:
    """What falls as clusters improve: the mean squared distance, halved for unit rows."""
    return objective if metric == "euclidean" else 1.0 - objective


def next_phase(history: Sequence[Iteration], rules: Rules) -> int | None:
    """The phase of the next iteration, or None at the end: a function of the history, so that a run resumes.

    A phase ends after its iterations, or when an iteration improved by no more than the tolerance. The latter
    counts only where neither that iteration nor the one before split a cluster: moved centres have not converged, and
    the rise that a split causes is measured in the iteration after it.
    """
    if not history:
        return 0
    phase = history[-1].phase
    values = [distortion(i.objective, rules.metric) for i in history if i.phase == phase]
    is_over = len(values) >= rules.phases[phase].num_iterations
    is_settled = len(values) > 1 and not any(i.num_splits for i in history[-2:])
    if is_settled and values[-2] - values[-1] <= rules.tolerance * abs(values[-2]):
        is_over = True
    return phase + is_over if phase + is_over < len(rules.phases) else None


def make_phases(
    num_rows: int, num_centers: int, num_iterations: int, points_per_center: Sequence[int], full_iterations: int
) -> tuple[Phase, ...]:
    """Iterations on growing samples, then `full_iterations` on all rows.

    Samples that would hold all rows are left out; without any, all iterations are on all rows.
    """
    rates = [points * num_centers / num_rows for points in sorted(set(points_per_center)) if points]
    rates = [rate for rate in rates if rate < 1]
    full = min(full_iterations, num_iterations) if rates else num_iterations
    bounds = [(num_iterations - full) * part // max(1, len(rates)) for part in range(len(rates) + 1)]
    phases = [Phase(rate, end - begin) for rate, begin, end in zip(rates, bounds, bounds[1:], strict=False)]
    return tuple(phase for phase in (*phases, Phase(1.0, full)) if phase.num_iterations)


@dataclass(frozen=True)
class Step:
    """New centres fp32 [C, E]; as assigned: rows int64 [C] and summed squared distances float64 [C] of each cluster,
    the objective and the number of rows."""

    centers_CE: Tensor
    counts_C: Tensor
    spreads_C: Tensor
    objective: float
    num_rows: int


def lloyd_step(
    rows: Rows, group: Group, assigner: Assigner, centers_CE: Tensor, metric: Metric, sample: Sample | None
) -> Step:
    """Assign and average. Collectives: reduce-scatter and all-gather of [C, E] fp32, all-reduce of [2C + 3] float64."""
    num_centers, dim = centers_CE.shape
    device = centers_CE.device
    per_rank = -(-num_centers // group.size)
    sums_CE = torch.zeros(per_rank * group.size, dim, device=device)
    # One tensor, so that one all-reduce adds them up over the ranks; float64 counts rows exactly.
    shared = torch.zeros(2 * num_centers + 3, dtype=torch.float64, device=device)
    counts_C, spreads_C, totals_3 = shared.split([num_centers, num_centers, 3])  # totals: scores, squared norms, rows
    assigner.set_centers(centers_CE)
    for numbers_B, stored_BE in rows.blocks(BLOCK_ROWS, sample):
        rows_BE = stored_BE.to(device).float()
        scores_B1, nearest_B1 = assigner.search(rows_BE, 1)
        nearest_B = nearest_B1[:, 0].to(device)
        scores_B = scores_B1[:, 0].to(device).double()
        squares_B = torch.linalg.vector_norm(rows_BE, dim=1).square().double()
        totals_3[0] += scores_B.sum()
        totals_3[1] += squares_B.sum()
        totals_3[2] += len(rows_BE)
        if not torch.isfinite(totals_3).all():
            number = numbers_B[int((~rows_BE.isfinite().all(dim=1)).nonzero()[0])]
            raise UserError(f"{rows.place(int(number))} is not finite. Make it again: `mlcd embed --overwrite`.")
        sums_CE.index_add_(0, nearest_B, rows_BE)
        counts_C += torch.bincount(nearest_B, minlength=num_centers)
        # With the cosine, centres have unit length; so do rows, up to fp16 rounding.
        distances_B = squares_B - 2 * scores_B + (metric == "cosine")
        spreads_C.index_add_(0, nearest_B, distances_B.clamp_min(0))
    sums_LE = group.reduce_scatter_sum(sums_CE)
    del sums_CE  # ahead of the new centres: both are [C, E]
    group.all_reduce_sum(shared)
    if metric == "cosine":
        means_LE = F.normalize(sums_LE, dim=1)
    else:
        counts_L = F.pad(counts_C, (0, per_rank * group.size - num_centers))[group.rank * per_rank :][:per_rank]
        means_LE = sums_LE / counts_L.clamp_min(1)[:, None].float()
    score, square, number = totals_3.tolist()
    objective = score / number if metric == "cosine" else (square - 2 * score) / number
    centers_CE = group.all_gather(means_LE)[:num_centers]
    return Step(centers_CE, counts_C.long(), spreads_C, objective, int(number))


def kmeans(
    rows: Rows,
    group: Group,
    assigner: Assigner,
    start: Clustering,
    rules: Rules,
    after_iteration: Callable[[Clustering], bool] = lambda _: True,
) -> Clustering:
    """Iterate from `start`, fresh or saved, until the phases are over or `after_iteration` returns False."""
    current = start
    while (phase := next_phase(current.history, rules)) is not None:
        rate = rules.phases[phase].rate
        sample = Sample(rate, rules.seed) if rate < 1 else None
        step = lloyd_step(rows, group, assigner, current.centers_CE, rules.metric, sample)
        counts_C = step.counts_C.cpu().numpy()
        generator = np.random.default_rng([rules.seed, current.num_iterations])
        clusters = Clusters(step.centers_CE, counts_C.copy(), step.spreads_C.cpu().numpy())
        num_splits = rules.repair(clusters, rate, current.num_iterations < rules.moving_iterations, generator)
        done = Iteration(phase, step.objective, step.num_rows, num_splits)
        current = replace(current, centers_CE=step.centers_CE, counts_C=counts_C, history=(*current.history, done))
        if not after_iteration(current):
            break
    return current
