"""Sampled classes: exact in number, uniform, a function of (seed, step, range)."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mlcd_ds.errors import UserError
from mlcd_ds.heads.centers import sample_features
from mlcd_ds.heads.class_sampling import num_sampled, sample_around, sample_classes
from mlcd_ds.heads.class_shards import ClassRange, class_range

CLASSES = ClassRange(100, 150, 400)


@pytest.mark.parametrize("num_classes", [3, 7, 37, 1_000_000])
@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_ranges_cover_all_classes_once(num_classes: int, num_shards: int) -> None:
    ranges = [class_range(num_classes, num_shards, shard) for shard in range(num_shards)]
    assert [r.begin for r in ranges] == [0, *(r.end for r in ranges[:-1])] and ranges[-1].end == num_classes
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_more_ranks_than_classes_is_an_error_with_both_numbers() -> None:
    with pytest.raises(UserError, match="8 ranks cannot share 7 classes"):
        class_range(7, 8, 0)


@pytest.mark.parametrize(("rate", "size"), [(0.001, 1), (0.1, 5), (0.5, 25), (0.99, 50), (1.0, 50)])
def test_size_is_exact_and_classes_are_distinct(rate: float, size: int) -> None:
    assert num_sampled(CLASSES, rate) == size
    for step in range(20):
        sampled = sample_classes(CLASSES, rate, 0, step)
        assert sampled.shape == (size,) and (sampled.diff() > 0).all()
        assert sampled.min() >= 0 and sampled.max() < len(CLASSES)


def chi_square(draw: Callable[[int], Tensor], num_steps: int = 2000) -> float:
    """Of the counts of classes, scaled for drawing without replacement, as chi-square of 49 degrees of freedom."""
    counts = torch.zeros(len(CLASSES))
    for step in range(num_steps):
        counts[draw(step)] += 1
    part = counts.sum() / num_steps / len(CLASSES)
    expected = counts.sum() / len(CLASSES)
    scale = (1 - part) * len(CLASSES) / (len(CLASSES) - 1)
    return float(((counts - expected).square() / expected).sum() / scale)


# 0.05% and 99.95% quantiles for 49 degrees of freedom; measured 51 and 49 (rates .1 and .5).
LEAST, MOST = 22.8, 88.2


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_every_class_is_drawn_equally_often(rate: float) -> None:
    assert LEAST < chi_square(lambda step: sample_classes(CLASSES, rate, 3, step)) < MOST


def test_known_bad_draws_are_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.ones(50).index_fill(0, torch.arange(10), 1.3)
    assert chi_square(lambda _: torch.multinomial(weights, 5, generator=generator)) > MOST, "some classes more often"
    assert chi_square(lambda step: (5 * step + torch.arange(5)) % 50) < LEAST, "in turn"


def test_steps_and_seeds_and_ranges_are_independent_of_each_other() -> None:
    """The overlap of two draws of 25 out of 50 is hypergeometric: mean 12.5, deviation 1.79."""

    def overlap(a: Tensor, b: Tensor) -> float:
        return len({*a.tolist()} & {*b.tolist()})

    other = ClassRange(150, 200, 400)
    draws = [sample_classes(CLASSES, 0.5, 0, step) for step in range(401)]
    by_step = [overlap(a, b) for a, b in itertools.pairwise(draws)]
    by_seed = [overlap(draws[step], sample_classes(CLASSES, 0.5, 1, step)) for step in range(400)]
    by_range = [overlap(draws[step], sample_classes(other, 0.5, 0, step)) for step in range(400)]
    by_place = [overlap(draws[step], sample_classes(CLASSES, 0.5, 0, step, place=1)) for step in range(400)]
    for overlaps in (by_step, by_seed, by_range, by_place):
        # Five deviations of a mean over 400; measured within 0.2 of 12.5.
        assert abs(torch.tensor(overlaps).double().mean() - 12.5) < 5 * 1.79 / 20


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_the_same_seed_and_step_draw_the_same(seed: int) -> None:
    first, again = (sample_classes(CLASSES, 0.1, seed, 2_000_000) for _ in range(2))
    assert torch.equal(first, again)


def test_partial_fc_keeps_every_label_and_fills_up() -> None:
    rows_K = torch.tensor([3, 3, 17, 49])
    sampled = [sample_around(rows_K, CLASSES, 0.5, 0, step) for step in range(400)]
    for sampled_S in sampled:
        assert len(sampled_S) == 25 and (sampled_S.diff() > 0).all() and {3, 17, 49} <= set(sampled_S.tolist())
    counts = torch.bincount(torch.cat(sampled), minlength=50)
    assert counts[[3, 17, 49]].tolist() == [400] * 3
    others = counts[[row for row in range(50) if row not in (3, 17, 49)]]
    # 22 of 47 others a step: 187 +- 10
    assert 130 < others.min() and others.max() < 245
    elsewhere = [sample_around(rows_K, CLASSES, 0.5, 0, step, place=1) for step in range(400)]
    shared = [len({*one.tolist()} & {*other.tolist()}) - 3 for one, other in zip(sampled, elsewhere, strict=True)]
    assert abs(torch.tensor(shared).double().mean() - 22 * 22 / 47) < 0.5, "another place draws others: 10.3 +- 0.09"
    many = torch.arange(30)
    assert sample_around(many, CLASSES, 0.1, 0, 0).tolist() == many.tolist(), "more labels than r allows: no negatives"


def test_features_are_the_same_on_all_ranks_and_change_with_the_step() -> None:
    assert sample_features(16, 1.0, 0, 0, torch.device("cpu")) is None
    drawn = [sample_features(16, 0.5, 0, step, torch.device("cpu")) for step in range(50)]
    for features_F in drawn:
        assert len(features_F) == 8 and (features_F.diff() > 0).all() and features_F.max() < 16
    assert torch.equal(drawn[3], sample_features(16, 0.5, 0, 3, torch.device("cpu")))
    assert len({tuple(features_F.tolist()) for features_F in drawn}) > 40
