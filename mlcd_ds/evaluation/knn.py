"""Weighted k-nearest-neighbour classification on frozen features, as in Wu et al. 2018 and DINO.

Shapes: N training samples, M test samples, D feature channels, C classes, m and n rows of a block of either.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mlcd_ds.evaluation.features import check_labelled

DEFAULT_KS = (10, 20, 100, 200)


def usable_ks(num_train: int, ks: Sequence[int] = DEFAULT_KS) -> tuple[int, ...]:
    """Those of `ks` that a training set of this size can serve."""
    return tuple(k for k in ks if k <= num_train)


def weighted_knn(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_MD: Tensor,
    test_labels_M: Tensor,
    num_classes: int,
    ks: Sequence[int] = DEFAULT_KS,
    temperature: float = 0.07,
    block: int = 4096,
) -> dict[int, float]:
    """Return the top-1 accuracy on the test set for each k.

    The k training samples of highest cosine similarity s vote for their label with weight exp(s / temperature).
    At most `block` x `block` similarities are held at a time, on the features' device, in fp32 or better.
    Raises ValueError for a k that is not in [1, N].
    """
    check_labelled(train_ND, train_labels_N, num_classes, "train")
    check_labelled(test_MD, test_labels_M, num_classes, "test")
    if not ks or min(ks) < 1 or max(ks) > len(train_ND):
        raise ValueError(f"ks {tuple(ks)} must be in [1, {len(train_ND)}], the training examples: see usable_ks")
    if temperature <= 0 or block < 1:
        raise ValueError(f"temperature {temperature} and block {block} must be positive")
    dtype = torch.promote_types(train_ND.dtype, torch.float32)
    train_ND = F.normalize(train_ND.to(dtype), dim=1)
    test_MD = F.normalize(test_MD.to(dtype), dim=1)
    num_correct = dict.fromkeys(ks, 0)
    for test_mD, labels_m in zip(test_MD.split(block), test_labels_M.split(block), strict=True):
        similarity_mk, index_mk = _nearest(train_ND, test_mD, max(ks), block)
        # relative to the nearest neighbour: the same votes up to a factor a row, and no overflow at a low temperature
        weight_mk = ((similarity_mk - similarity_mk[:, :1]) / temperature).exp()
        neighbour_labels_mk = train_labels_N[index_mk].long()
        for k in ks:
            votes_mC = weight_mk.new_zeros(len(test_mD), num_classes)
            votes_mC.scatter_add_(1, neighbour_labels_mk[:, :k], weight_mk[:, :k])
            num_correct[k] += int((votes_mC.argmax(1) == labels_m).sum())
    return {k: num_correct[k] / len(test_MD) for k in ks}


def _nearest(train_ND: Tensor, test_mD: Tensor, k: int, block: int) -> tuple[Tensor, Tensor]:
    """Return similarities and training indices of the k nearest, [m, k] each, nearest first."""
    best_mk = test_mD.new_empty(len(test_mD), 0)
    index_mk = torch.empty(len(test_mD), 0, dtype=torch.long, device=test_mD.device)
    for start in range(0, len(train_ND), block):
        similarity_mn = test_mD @ train_ND[start : start + block].T
        top_mk, position_mk = similarity_mn.topk(min(k, similarity_mn.shape[1]), dim=1)
        candidates = torch.cat([best_mk, top_mk], dim=1)
        best_mk, kept_mk = candidates.topk(min(k, candidates.shape[1]), dim=1)
        index_mk = torch.cat([index_mk, position_mk + start], dim=1).gather(1, kept_mk)
    return best_mk, index_mk
