"""What a clustering looks like, in numbers: sizes, similarities, and how well it agrees with given classes.

C centres, N labelled rows.
"""

from __future__ import annotations

import numpy as np

LARGEST_SHARE = 0.01


def gini(sizes_C: np.ndarray) -> float:
    """Gini coefficient: 0 when all clusters are equal, towards 1 when one has everything."""
    sorted_C = np.sort(sizes_C).astype(np.float64)
    number, total = len(sorted_C), sorted_C.sum()
    if not total:
        return 0.0
    return float(2 * (np.arange(1, number + 1) * sorted_C).sum() / (number * total) - (number + 1) / number)


def size_figures(sizes_C: np.ndarray) -> dict[str, float]:
    """Smallest, median, mean and largest cluster, empty ones, Gini, and the share of rows in the largest 1 %."""
    largest = max(1, round(LARGEST_SHARE * len(sizes_C)))
    return {
        "clusters": len(sizes_C),
        "images": int(sizes_C.sum()),
        "min": int(sizes_C.min()),
        "median": float(np.median(sizes_C)),
        "mean": float(sizes_C.mean()),
        "max": int(sizes_C.max()),
        "empty": int((sizes_C == 0).sum()),
        "gini": gini(sizes_C),
        "share_in_largest_1_percent": float(np.sort(sizes_C)[-largest:].sum() / max(1, sizes_C.sum())),
    }


def agreement(clusters_N: np.ndarray, classes_N: np.ndarray) -> dict[str, float]:
    """Purity, and normalised mutual information (by the arithmetic mean of both entropies)."""
    clusters_N, classes_N = (np.unique(values, return_inverse=True)[1] for values in (clusters_N, classes_N))
    number = len(clusters_N)
    cells, counts = np.unique(np.stack([clusters_N, classes_N]), axis=1, return_counts=True)
    best = np.zeros(clusters_N.max() + 1, dtype=np.int64)
    np.maximum.at(best, cells[0], counts)
    by_cluster, by_class = np.bincount(clusters_N) / number, np.bincount(classes_N) / number
    joint = counts / number
    mutual = float((joint * np.log(joint / (by_cluster[cells[0]] * by_class[cells[1]]))).sum())
    entropies = [-float((share * np.log(share)).sum()) for share in (by_cluster, by_class)]
    return {
        "labelled_images": number,
        "purity": float(best.sum() / number),
        "nmi": mutual / max(1e-12, sum(entropies) / 2),
    }


class Extremes:
    """The nearest and farthest members of some clusters, among all that were seen."""

    def __init__(self, clusters: list[int], num_shown: int) -> None:
        self._num_shown = num_shown
        self.members: dict[int, list[tuple[float, int, int]]] = {cluster: [] for cluster in clusters}

    def see(self, shard: int, nearest_N: np.ndarray, similarity_N: np.ndarray) -> None:
        """Take in a shard's rows: the centre of each, and the similarity to it."""
        for cluster in self.members:
            rows = np.flatnonzero(nearest_N == cluster)
            self.add(cluster, [(float(similarity_N[row]), shard, int(row)) for row in rows])

    def add(self, cluster: int, members: list[tuple[float, int, int]]) -> None:
        """Take in members, (similarity, shard, row), and forget those between the extremes."""
        found = sorted(set(self.members[cluster]) | set(members), key=lambda member: (-member[0], *member[1:]))
        number = self._num_shown
        self.members[cluster] = found if len(found) <= 2 * number else found[:number] + found[-number:]
