"""Exact-r sampling of the classes that serve as negatives in one step.

Partial FC keeps every positive of the batch and fills up with random classes. With eight labels an image and a large
batch the positives alone exceed r * C, and no random negative is left. Here the sample is uniform over each rank's
classes, independent of the labels and shared by the whole batch: its size is exact, its shape static.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlcd_ds.heads.class_shards import ClassRange


def num_sampled(classes: ClassRange, rate: float) -> int:
    """S: how many of a rank's classes are drawn, `rate` of them and at least one."""
    return max(1, round(rate * len(classes)))


def sample_classes(classes: ClassRange, rate: float, seed: int, step: int) -> Tensor:
    """Sorted local indices int64 [S] into a rank's classes, a function of (seed, step, the range) alone."""
    if rate == 1.0:
        return torch.arange(len(classes))
    mixed = ((seed * 1_000_003 + step) * 1_000_003 + classes.begin) % 2**63  # a generator takes 64 bits
    generator = torch.Generator().manual_seed(mixed)
    return torch.randperm(len(classes), generator=generator)[: num_sampled(classes, rate)].sort().values
