"""Which rank owns which classes: contiguous ranges, nearly equal, in rank order."""

from __future__ import annotations

from dataclasses import dataclass

from mlcd_ds.errors import UserError


@dataclass(frozen=True)
class ClassRange:
    """Classes [begin, end) of `num_classes`."""

    begin: int
    end: int
    num_classes: int

    def __len__(self) -> int:
        return self.end - self.begin


def class_range(num_classes: int, num_shards: int, shard: int) -> ClassRange:
    """The classes of one shard. Raises UserError when there are more shards than classes."""
    if num_shards > num_classes:
        raise UserError(f"{num_shards} ranks cannot share {num_classes} classes: start fewer ranks or cluster finer.")
    return ClassRange(num_classes * shard // num_shards, num_classes * (shard + 1) // num_shards, num_classes)
