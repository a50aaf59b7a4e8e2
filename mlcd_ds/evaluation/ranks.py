"""The ranks that measure together: rows are dealt over them, each has consecutive ones, in the order of the ranks.

n rows on this rank, N on all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlcd_ds.distributed.collectives import Group


class Ranks:
    """A group, or one process alone, for which every call gives back what it was given."""

    def __init__(self, group: Group | None = None) -> None:
        self._group = group if group is not None and group.size > 1 else None

    @property
    def size(self) -> int:
        return 1 if self._group is None else self._group.size

    @property
    def rank(self) -> int:
        return 0 if self._group is None else self._group.rank

    def share(self, count: int) -> slice:
        """This rank's part of `count` rows: as many as the others have, or one more."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place; returns its argument. One all-reduce."""
        return values if self._group is None else self._group.all_reduce_sum(values)

    def total(self, number: float, device: torch.device | None = None) -> float:
        """Sum of the ranks' numbers, exact for whole numbers up to 2^53. One all-reduce."""
        return (
            number if self._group is None else float(self.sum(torch.tensor(number, dtype=torch.float64, device=device)))
        )

    def agree(self, number: float, device: torch.device | None = None) -> float:
        """Rank 0's number, on which a decision hangs that all ranks must take alike. One all-reduce."""
        return self.total(number if self.rank == 0 else 0.0, device)

    def from_first(self, values: Tensor) -> Tensor:
        """Rank 0's tensor, in place of those that the others computed. One all-reduce."""
        return values if self._group is None else self.sum(values if self.rank == 0 else values.zero_())

    def counts(self, count: int, device: torch.device | None = None) -> list[int]:
        """The ranks' counts. One all-gather."""
        if self._group is None:
            return [count]
        return self._group.all_gather(torch.tensor([count], device=device)).tolist()

    def concat(self, rows_n: Tensor) -> Tensor:
        """[n, ...] on each rank -> [N, ...] on every rank. n may differ. Two all-gathers."""
        if self._group is None:
            return rows_n
        counts = self.counts(len(rows_n), rows_n.device)
        padded = rows_n.new_zeros(max(counts), *rows_n.shape[1:])
        padded[: len(rows_n)] = rows_n
        parts = self._group.all_gather(padded).view(self.size, *padded.shape)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


ALONE = Ranks()
