"""Empty, small and large clusters: what is split for what."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlcd_ds.clustering.repair import ByCell, SizeLimits


def make(counts: list[int]) -> tuple[torch.Tensor, np.ndarray]:
    rows = np.random.default_rng(0).standard_normal((len(counts), 6)).astype(np.float32)
    return torch.nn.functional.normalize(torch.from_numpy(rows)), np.array(counts)


def generator() -> np.random.Generator:
    return np.random.default_rng(1)


def test_an_empty_cluster_takes_half_of_the_largest_each_time() -> None:
    centers, counts = make([10, 0, 100, 0, 30])
    before = centers.clone()
    assert SizeLimits()(centers, counts, 1.0, generator()) == 2
    assert sorted(counts.tolist()) == [10, 25, 25, 30, 50] and counts.sum() == 140
    assert torch.equal(centers[[0, 4]], before[[0, 4]])
    for center in (1, 2, 3):
        assert 0 < float((centers[center] - before[2]).norm()) < 5e-3
    assert float((centers[1] - centers[2]).norm()) > 1e-4
    assert torch.allclose(centers.norm(dim=1), torch.ones(5), atol=1e-6)
    unchanged = centers.clone()
    assert SizeLimits()(centers, counts, 1.0, generator()) == 0 and torch.equal(centers, unchanged)


def test_lengths_are_kept_where_they_mean_something() -> None:
    centers, counts = make([10, 0, 3])
    centers[0] *= 7
    SizeLimits()(centers, counts, 1.0, generator())
    assert torch.allclose(centers.norm(dim=1), torch.tensor([7.0, 7.0, 1.0]))


def test_a_cluster_below_the_minimum_is_dissolved() -> None:
    centers, counts = make([10, 2, 100, 4, 30])
    assert SizeLimits(min_size=5)(centers, counts, 1.0, generator()) == 2
    assert counts.min() >= 5
    # Known-bad twin: nothing is split where the halves would be too small again.
    centers, counts = make([9, 2, 9])
    assert SizeLimits(min_size=5)(centers, counts, 1.0, generator()) == 0
    # A share of the rows has that share of the minimum.
    centers, counts = make([10, 2, 100])
    assert SizeLimits(min_size=5)(centers, counts, 0.4, generator()) == 0
    assert SizeLimits(min_size=5)(centers, counts, 0.5, generator()) == 1


def test_a_cluster_above_the_maximum_is_split_at_the_cost_of_the_smallest() -> None:
    centers, counts = make([10, 12, 100, 14, 30])
    assert SizeLimits(max_size=40)(centers, counts, 1.0, generator()) == 3
    assert counts.tolist() == [25, 25, 25, 25, 30]
    centers, counts = make([50, 60, 70])  # as even as it gets
    assert SizeLimits(max_size=40)(centers, counts, 1.0, generator()) == 0


@pytest.mark.parametrize("counts", [[0, 0, 7], [1, 0, 0], [0, 5, 0, 5, 0, 0, 0, 0]])
def test_hopeless_cases_end(counts: list[int]) -> None:
    centers, numbers = make(counts)
    assert SizeLimits(2, 3)(centers, numbers, 1.0, generator()) >= counts.count(0)
    assert torch.isfinite(centers).all() and numbers.sum() == sum(counts)


def test_cells_are_repaired_by_themselves() -> None:
    centers, counts = make([9, 0, 1000, 4, 0, 6])
    before = centers.clone()
    assert ByCell(np.array([0, 2, 3, 6]))(centers, counts, 1.0, generator()) == 2
    assert counts.tolist() == [5, 4, 1000, 4, 3, 3]
    assert float((centers[1] - before[0]).norm()) < 5e-3 and float((centers[4] - before[5]).norm()) < 5e-3
