"""The ranks of a job by what they share: all, those with different images, those with the same."""

from __future__ import annotations

import functools

from mlcd_ds.distributed.collectives import Group, subgroup


class ParallelGroups:
    """Consecutive ranks form a tensor-parallel group. A group is made when it is first asked for: collective then."""

    def __init__(self, world: Group, tensor_parallel: int = 1) -> None:
        self.world, self.tensor_parallel = world, tensor_parallel

    @functools.cached_property
    def data(self) -> Group:
        """Ranks with different images, which see the whole batch between them: one of each tensor-parallel group."""
        size = self.tensor_parallel
        return subgroup(self.world, [range(place, self.world.size, size) for place in range(size)])

    @functools.cached_property
    def tensor(self) -> Group | None:
        """Ranks with the same images; None where each rank has its own."""
        size = self.tensor_parallel
        if size == 1:
            return None
        return subgroup(self.world, [range(first, first + size) for first in range(0, self.world.size, size)])
