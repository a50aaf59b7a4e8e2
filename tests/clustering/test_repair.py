"""Empty, cheap, small and large clusters: what is split for what."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlcd_ds.clustering.repair import Clusters, Repair, RepairByCell


def make(counts: list[int], spreads: list[float] | None = None) -> Clusters:
    rows = np.random.default_rng(0).standard_normal((len(counts), 6)).astype(np.float32)
    centers = torch.nn.functional.normalize(torch.from_numpy(rows))
    return Clusters(
        centers, np.array(counts), np.array(counts if spreads is None else spreads, dtype=np.float64) * 0.01
    )


def generator() -> np.random.Generator:
    return np.random.default_rng(1)


def test_an_empty_cluster_takes_half_of_the_largest_spread() -> None:
    clusters = make([10, 0, 100, 0, 30])
    before = clusters.centers_CE.clone()
    assert Repair("cosine")(clusters, 1.0, False, generator()) == 2
    assert clusters.counts_C.tolist() == [10, 50, 50, 15, 15]
    assert torch.equal(clusters.centers_CE[0], before[0])
    for moved, split in ((1, 2), (3, 4)):
        apart = float((clusters.centers_CE[moved] - clusters.centers_CE[split]).norm())
        assert 0.03 < apart < 0.11  # along the sphere; the root mean square distance is 0.1
        middle = (clusters.centers_CE[moved] + clusters.centers_CE[split]) / 2
        assert float((middle - before[split]).norm()) < 0.01
    assert torch.allclose(clusters.centers_CE.norm(dim=1), torch.ones(5), atol=1e-6)
    unchanged = clusters.centers_CE.clone()
    assert Repair("cosine")(clusters, 1.0, False, generator()) == 0
    assert torch.equal(clusters.centers_CE, unchanged)


def test_euclidean_halves_have_their_middle_where_the_centre_was() -> None:
    clusters = make([10, 0, 3])
    clusters.centers_CE *= 7
    before = clusters.centers_CE.clone()
    Repair("euclidean")(clusters, 1.0, False, generator())
    assert torch.allclose((clusters.centers_CE[0] + clusters.centers_CE[1]) / 2, before[0], atol=1e-5)


def test_cheap_clusters_give_their_centres_to_expensive_ones() -> None:
    counts, spreads = [20] * 100, [100.0] * 97 + [1.0, 2.0, 500.0]
    clusters = make(counts, spreads)
    assert Repair("cosine")(clusters, 1.0, False, generator()) == 0, "not unless they may move"
    assert Repair("cosine")(clusters, 1.0, True, generator()) == 2
    assert clusters.spreads_C[[97, 99]].tolist() == pytest.approx([2.5, 2.5])
    assert clusters.counts_C[[97, 99]].tolist() == [10, 10]
    even = make(counts, [100.0] * 90 + [20.0] * 10)
    assert Repair("cosine")(even, 1.0, True, generator()) == 0, "known-bad twin: no difference that pays"


def test_a_cluster_below_the_minimum_is_dissolved() -> None:
    clusters = make([10, 2, 100, 4, 30])
    assert Repair("cosine", min_size=5)(clusters, 1.0, False, generator()) == 2
    assert clusters.counts_C.min() >= 5
    # Known-bad twin: nothing is split where the halves would be too small again.
    assert Repair("cosine", min_size=5)(make([9, 2, 9]), 1.0, False, generator()) == 0
    # A share of the rows has that share of the minimum.
    assert Repair("cosine", min_size=5)(make([10, 2, 100]), 0.4, False, generator()) == 0
    assert Repair("cosine", min_size=5)(make([10, 2, 100]), 0.5, False, generator()) == 1


def test_a_cluster_above_the_maximum_is_split_at_the_cost_of_the_smallest() -> None:
    clusters = make([10, 12, 100, 14, 45])
    assert Repair("cosine", max_size=40)(clusters, 1.0, False, generator()) == 2
    assert sorted(clusters.counts_C.tolist()) == [14, 22, 23, 50, 50]
    assert Repair("cosine", max_size=40)(make([50, 60, 70]), 1.0, False, generator()) == 0  # as even as it gets


@pytest.mark.parametrize("counts", [[0, 0, 7], [1, 0, 0], [0, 5, 0, 5, 0, 0, 0, 0]])
def test_hopeless_cases_end(counts: list[int]) -> None:
    clusters = make(counts)
    assert Repair("cosine", 2, 3)(clusters, 1.0, True, generator()) >= 1
    assert torch.isfinite(clusters.centers_CE).all() and clusters.counts_C.sum() == sum(counts)


def test_cells_are_repaired_by_themselves() -> None:
    clusters = make([9, 0, 1000, 4, 0, 6])
    before = clusters.centers_CE.clone()
    assert RepairByCell("cosine", np.array([0, 2, 3, 6]))(clusters, 1.0, False, generator()) == 2
    assert clusters.counts_C.tolist() == [5, 4, 1000, 4, 3, 3]
    for moved, split in ((1, 0), (4, 5)):
        middle = (clusters.centers_CE[moved] + clusters.centers_CE[split]) / 2
        assert float((middle - before[split]).norm()) < 0.01
