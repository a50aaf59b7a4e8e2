"""Labelled images as kNN and the linear probe take them.

n rows on this rank; D feature channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mlcd_ds.errors import UserError
from mlcd_ds.evaluation.ranks import Ranks
from mlcd_ds.stages.protocols.rows import Rows, refuse_unlabelled


@dataclass(frozen=True)
class Labelled:
    """One split: this rank's share of its rows."""

    rows: Rows
    features_nD: Tensor
    labels_n: Tensor

    @property
    def folder(self) -> Path:
        """Of the index, for messages."""
        return self.rows.index.folder


def labelled(rows: Rows, label_key: str, ranks: Ranks, device: torch.device) -> Labelled:
    """UserError where no sample has a label."""
    refuse_unlabelled(rows, label_key)
    return Labelled(rows, rows.own("", ranks, device), rows.own("labels", ranks, device))


def count_classes(train: Labelled, test: Labelled, label_key: str) -> int:
    """Classes of the training images. UserError for ids, and for a class that only the test images have."""
    train_labels_N = train.rows.all("labels")
    num_classes, num_different = int(train_labels_N.max()) + 1, len(np.unique(train_labels_N))
    if num_classes > max(10_000, 100 * num_different):  # a row of weights each would exhaust memory
        raise UserError(
            f"{train.folder} has label {num_classes - 1}, but only {num_different} different ones: {label_key!r} "
            "holds ids, not class numbers. Name another --label-key."
        )
    largest = int(test.rows.all("labels").max())
    if largest >= num_classes:
        raise UserError(f"{test.folder} has label {largest}, which no training image has.")
    return num_classes
