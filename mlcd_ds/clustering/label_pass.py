"""The nearest centres of every row of a shard, and how similar they are.

N rows of a shard, B rows of a block, P labels a row, E width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mlcd_ds.clustering.assigner import Assigner, Metric

BLOCK_ROWS = 65_536


def label_rows(
    assigner: Assigner,
    rows_NE: Tensor,
    num_labels: int,
    metric: Metric = "cosine",
    threshold: float | None = None,
    device: torch.device | str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """Centres int32 [N, P], nearest first, and similarities fp16 [N, P]: cosines, or minus squared distances.

    With a threshold, labels after the first that are less similar are -1, and their similarity is that of no label,
    -inf. Rows and centres are taken as they are: of unit length where the metric is the cosine.
    """
    labels = [np.empty((0, num_labels), np.int32)]
    similarities = [np.empty((0, num_labels), np.float16)]
    for begin in range(0, len(rows_NE), BLOCK_ROWS):
        rows_BE = rows_NE[begin : begin + BLOCK_ROWS].to(device).float()
        similarity_BP, labels_BP = assigner.search(rows_BE, num_labels)
        if metric == "euclidean":
            similarity_BP = 2 * similarity_BP - rows_BE.square().sum(dim=1, keepdim=True).to(similarity_BP.device)
        if threshold is not None:
            is_far_BP = similarity_BP < threshold
            is_far_BP[:, 0] = False
            labels_BP = labels_BP.masked_fill(is_far_BP, -1)
            similarity_BP = similarity_BP.masked_fill(is_far_BP, -torch.inf)
        labels.append(labels_BP.int().cpu().numpy())
        similarities.append(similarity_BP.half().cpu().numpy())
    return np.concatenate(labels), np.concatenate(similarities)
