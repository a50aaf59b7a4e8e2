"""Accuracies from predictions.

Shapes: M test samples, C classes.
"""

import torch
from torch import Tensor


def confusion_matrix(predictions_M: Tensor, labels_M: Tensor, num_classes: int) -> Tensor:
    """Return counts [C, C] (int64): row is the true class, column the predicted one."""
    pairs_M = labels_M.long() * num_classes + predictions_M.long()
    return torch.bincount(pairs_M, minlength=num_classes**2).reshape(num_classes, num_classes)


def per_class_accuracy(confusion_CC: Tensor) -> Tensor:
    """Return each class's recall [C] (float64); NaN for a class without a test sample."""
    return confusion_CC.diagonal().double() / confusion_CC.sum(1).double()


def bootstrap_standard_error(correct_M: Tensor, generator: torch.Generator, num_resamples: int = 1000) -> float:
    """Standard error of the mean of `correct_M` over test sets redrawn with replacement.

    It is the error from the choice of test samples only, not from training. It tends to sqrt(p (1 - p) / M).
    """
    correct_M = correct_M.to(generator.device, torch.float64)
    means = torch.empty(num_resamples, dtype=torch.float64)
    for i in range(num_resamples):
        index_M = torch.randint(len(correct_M), correct_M.shape, generator=generator, device=generator.device)
        means[i] = correct_M[index_M].mean()
    return float(means.std())
