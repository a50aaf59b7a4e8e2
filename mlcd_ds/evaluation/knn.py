"""Weighted k-nearest-neighbour classification on frozen features, as in Wu et al. 2018 and DINO.

Shapes: N training samples, M test samples, D feature channels, C classes, R ranks; n and m samples on this rank, b rows
of a block, k neighbours.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mlcd_ds.evaluation.features import check_labelled
from mlcd_ds.evaluation.ranks import ALONE, Ranks

DEFAULT_KS = (10, 20, 100, 200)


def usable_ks(num_train: int, ks: Sequence[int] = DEFAULT_KS) -> tuple[int, ...]:
    """Those of `ks` that a training set of this size can serve."""
    return tuple(k for k in ks if k <= num_train)


def weighted_knn(
    train_nD: Tensor,
    train_labels_n: Tensor,
    test_mD: Tensor,
    test_labels_m: Tensor,
    num_classes: int,
    ks: Sequence[int] = DEFAULT_KS,
    temperature: float = 0.07,
    block: int = 4096,
    ranks: Ranks = ALONE,
) -> dict[int, float]:
    """Return the top-1 accuracy on the test set for each k.

    The k training samples of highest cosine similarity s vote for their label with weight exp(s / temperature).
    At most `block` x `block` similarities are held at a time, on the features' device, in fp32 or better.
    Raises ValueError for a k that is not in [1, N].

    With `ranks` each gives its own training and test samples, some may have none. A block of test samples goes to all
    ranks, each finds the nearest among its training samples, and those of all ranks are gathered: the k nearest of all
    are among them. Collectives: an all-gather of test features and one of [b, k] neighbours a block, sums.
    """
    check_labelled(train_nD, train_labels_n, num_classes, "train", ranks.size > 1)
    check_labelled(test_mD, test_labels_m, num_classes, "test", ranks.size > 1)
    device = test_mD.device
    num_train, num_test = (int(ranks.total(len(rows), device)) for rows in (train_nD, test_mD))
    if not ks or min(ks) < 1 or max(ks) > num_train:
        raise ValueError(f"ks {tuple(ks)} must be in [1, {num_train}], the training examples: see usable_ks")
    if temperature <= 0 or block < 1:
        raise ValueError(f"temperature {temperature} and block {block} must be positive")
    dtype = torch.promote_types(train_nD.dtype, torch.float32)
    train_nD = F.normalize(train_nD.to(dtype), dim=1)
    test_mD = F.normalize(test_mD.to(dtype), dim=1)
    own_block = max(1, block // ranks.size)
    correct_k = torch.zeros(len(ks), dtype=torch.float64, device=device)
    for start in range(0, max(ranks.counts(len(test_mD), device)), own_block):
        own_bD, labels_b = test_mD[start : start + own_block], test_labels_m[start : start + own_block]
        begin = sum(ranks.counts(len(own_bD), device)[: ranks.rank])
        similarity_bk, index_bk = _nearest(train_nD, ranks.concat(own_bD), max(ks), block)
        found = _nearest_of_all(similarity_bk, train_labels_n[index_bk].long(), max(ks), ranks)
        similarity_bk, neighbour_labels_bk = (part[begin : begin + len(own_bD)] for part in found)
        # relative to the nearest neighbour: the same votes up to a factor a row, and no overflow at a low temperature
        weight_bk = ((similarity_bk - similarity_bk[:, :1]) / temperature).exp()
        for number, k in enumerate(ks):
            votes_bC = weight_bk.new_zeros(len(own_bD), num_classes)
            votes_bC.scatter_add_(1, neighbour_labels_bk[:, :k], weight_bk[:, :k])
            correct_k[number] += (votes_bC.argmax(1) == labels_b).sum()
    return {k: num_correct / num_test for k, num_correct in zip(ks, ranks.sum(correct_k).tolist(), strict=True)}


def _nearest(train_nD: Tensor, test_bD: Tensor, k: int, block: int) -> tuple[Tensor, Tensor]:
    """Return similarities and indices of the k nearest of this rank's training samples, [b, <= k], nearest first."""
    best_bk = test_bD.new_empty(len(test_bD), 0)
    index_bk = torch.empty(len(test_bD), 0, dtype=torch.long, device=test_bD.device)
    for start in range(0, len(train_nD), block):
        similarity = test_bD @ train_nD[start : start + block].T
        top_bk, position_bk = similarity.topk(min(k, similarity.shape[1]), dim=1)
        candidates = torch.cat([best_bk, top_bk], dim=1)
        best_bk, kept_bk = candidates.topk(min(k, candidates.shape[1]), dim=1)
        index_bk = torch.cat([index_bk, position_bk + start], dim=1).gather(1, kept_bk)
    return best_bk, index_bk


def _nearest_of_all(similarity_bk: Tensor, labels_bk: Tensor, k: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Of each rank's nearest, with their labels, the k nearest of all ranks, [b, k] each."""
    if ranks.size == 1:
        return similarity_bk, labels_bk
    missing = k - similarity_bk.shape[1]  # a rank with fewer training samples
    similarity_bk = F.pad(similarity_bk, (0, missing), value=-torch.inf)
    labels_bk = F.pad(labels_bk, (0, missing))
    candidates_b, labels_b = (ranks.concat(part.T.contiguous()).T for part in (similarity_bk, labels_bk))
    nearest_bk, place_bk = candidates_b.topk(k, dim=1)
    return nearest_bk, labels_b.gather(1, place_bk)
