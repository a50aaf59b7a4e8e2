"""kNN weighted by exp(cosine / 0.07), on features before the projection."""

from __future__ import annotations

from mlcd_ds.errors import UserError
from mlcd_ds.evaluation.knn import usable_ks, weighted_knn
from mlcd_ds.evaluation.ranks import Ranks
from mlcd_ds.stages.protocols.base import Outcome
from mlcd_ds.stages.protocols.labelled import Labelled

HEADLINE_K = 20


def check(train: Labelled) -> None:
    """UserError where there are too few training images."""
    if not usable_ks(train.rows.count):
        raise UserError(f"{train.folder} has {train.rows.count} labelled images: too few for kNN. Label more.")


def measure(train: Labelled, test: Labelled, num_classes: int, ranks: Ranks) -> Outcome:
    """Top-1 for each k that the training set can serve; the headline is k = 20."""
    own = train.features_nD, train.labels_n, test.features_nD, test.labels_n
    by_k = weighted_knn(*own, num_classes, usable_ks(train.rows.count), ranks=ranks)
    headline = by_k.get(HEADLINE_K, by_k[min(by_k)])
    return Outcome({"knn": headline, "knn_by_k": by_k}, f"kNN {headline:.1%}")
