"""Collectives over a group of ranks, on whole tensors, with shapes in their names.

B rows on this rank, G = R * B rows of all ranks, in rank order; R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
# torch 2.13 renamed both; the old names warn there.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True)
class Group:
    """Ranks that communicate. None of the calls carries a gradient: callers derive theirs and say so.

    On a GPU a collective of tensors only queues work and the host runs on. What must be true on the host, a file
    written or a signal seen, goes through `barrier`, `gather_objects` and `max_on_host`, which use tensors of the CPU.
    """

    process_group: dist.ProcessGroup

    @property
    def rank(self) -> int:
        return dist.get_rank(self.process_group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.process_group)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_gather(self, rows_B: Tensor) -> Tensor:
        """[B, ...] on each rank -> [G, ...] on every rank. B is the same everywhere. One all-gather."""
        rows_G = rows_B.new_empty((self.size * rows_B.shape[0], *rows_B.shape[1:]))
        _all_gather(rows_G, rows_B.contiguous(), group=self.process_group)
        return rows_G

    def reduce_scatter_sum(self, rows_G: Tensor) -> Tensor:
        """[G, ...] on each rank -> this rank's [B, ...] of the sum over ranks. One reduce-scatter."""
        rows_B = rows_G.new_empty((rows_G.shape[0] // self.size, *rows_G.shape[1:]))
        _reduce_scatter(rows_B, rows_G.contiguous(), group=self.process_group)
        return rows_B

    def exchange(self, parts: Sequence[Tensor]) -> Tensor:
        """One part [n, ...] for each rank -> the parts for this rank, in rank order, [m, ...]. Lengths may differ.

        One all-gather of lengths, one all-to-all.
        """
        lengths = torch.tensor([len(part) for part in parts], device=parts[0].device)
        received = self.all_gather(lengths[None])[:, self.rank].tolist()
        rows_M = parts[0].new_empty((sum(received), *parts[0].shape[1:]))
        dist.all_to_all_single(rows_M, torch.cat(list(parts)), received, lengths.tolist(), group=self.process_group)
        return rows_M

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place; returns its argument. One all-reduce."""
        dist.all_reduce(values, group=self.process_group)
        return values

    def all_reduce_max(self, values: Tensor) -> Tensor:
        """Maximum over ranks, in place; returns its argument. One all-reduce."""
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.process_group)
        return values

    def gather_objects(self, item: T) -> list[T]:
        """Small Python objects of all ranks, in rank order, on every rank. Not for a training step."""
        items: list[T | None] = [None] * self.size
        dist.all_gather_object(items, item, group=self.process_group)
        return items  # type: ignore[return-value]

    def max_on_host(self, value: float) -> float:
        """Largest of the ranks' numbers: the host waits for all ranks. One all-reduce on the CPU."""
        return self.start_max_on_host(value)()

    def start_max_on_host(self, value: float) -> Callable[[], float]:
        """The same without waiting: call the returned function for the answer. One all-reduce on the CPU."""
        largest = torch.tensor([value], dtype=torch.float64)
        work = dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.process_group, async_op=True)

        def answer() -> float:
            work.wait()
            return float(largest)

        return answer

    def barrier(self) -> None:
        """Wait, on the host, for all ranks: what each did before it, the others see after it."""
        self.max_on_host(0.0)


def subgroup(world: Group, partition: Sequence[Sequence[int]]) -> Group:
    """The part of `partition` (ranks of the whole job) that this rank is in. Collective over `world`."""
    if len(partition) == 1:
        return world
    groups = [dist.new_group(list(ranks)) for ranks in partition]
    return next(type(world)(group) for group, ranks in zip(groups, partition, strict=True) if world.rank in ranks)
