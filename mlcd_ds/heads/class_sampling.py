"""Which of a rank's classes serve as negatives in a step.

Partial FC keeps every positive of the batch and fills up with random classes. With eight labels an image and a large
batch the positives alone exceed r * C, and no random negative is left. Here the sample is uniform over each rank's
classes, independent of the labels and shared by the whole batch: its size is exact, its shape static. Partial FC's way
is kept for comparison.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlcd_ds.heads.class_shards import ClassRange


def mixed_seed(seed: int, step: int, part: int) -> int:
    """A generator's 64-bit seed from a run's seed, the step, and the part that draws."""
    return ((seed * 1_000_003 + step) * 1_000_003 + part) % 2**63


def sample_seed(classes: ClassRange, seed: int, step: int, place: int) -> int:
    """The seed of a rank's sample: of its range, and of the label's place, where each place has a sample of its own."""
    return mixed_seed(seed, step, classes.begin + place * classes.num_classes)


def num_sampled(classes: ClassRange, rate: float) -> int:
    """S: how many of a rank's classes are drawn, `rate` of them and at least one."""
    return max(1, round(rate * len(classes)))


def sample_classes(
    classes: ClassRange, rate: float, seed: int, step: int, device: torch.device | str = "cpu", place: int = 0
) -> Tensor:
    """Sorted local indices int64 [S] into a rank's classes, a function of (seed, step, the range, the place) alone.

    Drawn on the device itself, so that the host need not wait; a CPU and a GPU draw different classes.
    """
    if rate == 1.0:
        return torch.arange(len(classes), device=device)
    generator = torch.Generator(device).manual_seed(sample_seed(classes, seed, step, place))
    order_L = torch.randperm(len(classes), generator=generator, device=device)
    return order_L[: num_sampled(classes, rate)].sort().values


def sample_around(
    rows_K: Tensor,
    classes: ClassRange,
    rate: float,
    seed: int,
    step: int,
    device: torch.device | str = "cpu",
    place: int = 0,
) -> Tensor:
    """Partial FC's sample: all of the batch's positive rows, filled up with random others to `num_sampled`.

    Sorted local indices; more than `num_sampled` of them where the positives alone are more. The host waits for it.
    """
    generator = torch.Generator(device).manual_seed(sample_seed(classes, seed, step, place))
    order_L = torch.randperm(len(classes), generator=generator, device=device)
    is_positive_L = torch.zeros(len(classes), dtype=torch.bool, device=device)
    is_positive_L[rows_K] = True
    positives_first_L = torch.cat([order_L[is_positive_L[order_L]], order_L[~is_positive_L[order_L]]])
    return positives_first_L[: max(num_sampled(classes, rate), int(is_positive_L.sum()))].sort().values
