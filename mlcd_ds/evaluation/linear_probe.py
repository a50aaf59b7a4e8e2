"""Linear probe on frozen features: logistic regression by L-BFGS, as in CLIP (Radford et al. 2021, A.3).

Shapes: N training examples, M test examples, D feature channels, C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mlcd_ds.evaluation.accuracy import bootstrap_standard_error, confusion_matrix, per_class_accuracy
from mlcd_ds.evaluation.features import check_labelled

L2_GRID = tuple(10.0 ** (-6 + step / 8) for step in range(97))  # 96 steps, 8 a decade
_COARSE_STRIDE = 16  # two decades, as CLIP starts
_FLOAT64_MAX_ELEMENTS = 2**24  # 128 MiB of features in float64

Progress = Callable[[float, float, int], None]
"""Called after each fit of the sweep with l2, validation accuracy and iterations."""


@dataclass(frozen=True, eq=False)
class LogisticFit:
    """A multinomial logistic regression: logits = features @ weight_CD.T + bias_C."""

    weight_CD: Tensor
    bias_C: Tensor
    num_iterations: int

    def logits(self, features_ND: Tensor) -> Tensor:
        """Return the logits [N, C]."""
        return F.linear(features_ND, self.weight_CD, self.bias_C)


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What a linear probe measured on the test set, and how it came to its one hyperparameter."""

    accuracy: float
    accuracy_se: float  # bootstrap over the test examples
    mean_per_class: float  # over the classes with a test example
    per_class_accuracy: tuple[float, ...]  # NaN for a class without a test example
    confusion_CC: Tensor  # counts; row true, column predicted
    predictions_M: Tensor
    l2: float
    validation_accuracy: float  # at the chosen l2
    validation_curve: tuple[tuple[float, float], ...]  # (l2, validation accuracy), l2 rising
    num_fit: int  # examples that the sweep was fitted on; the refit has num_val more
    num_val: int
    num_iterations: int  # of the refit


def stratified_split(labels_N: Tensor, val_fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return disjoint indices (fit, validation) that share every class in the same proportion, sorted, on the CPU.

    A class with two or more examples has at least one on either side; the only example of a class goes to fit.
    """
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(f"val_fraction {val_fraction} must be in (0, 1)")
    labels_N = labels_N.cpu()
    fit, val = [], []
    for label in labels_N.unique():
        members = (labels_N == label).nonzero()[:, 0]
        shuffled = members[torch.randperm(len(members), generator=generator, device=generator.device).cpu()]
        num_val = min(max(round(len(members) * val_fraction), 1), len(members) - 1)
        val.append(shuffled[:num_val])
        fit.append(shuffled[num_val:])
    return torch.cat(fit).sort().values, torch.cat(val).sort().values


def fit_logistic(
    features_ND: Tensor,
    labels_N: Tensor,
    num_classes: int,
    l2: float,
    start: LogisticFit | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
) -> LogisticFit:
    """Minimise sum_i CE(logits_i, label_i) + l2 / 2 * |W|^2 by full-batch L-BFGS; l2 is scikit-learn's 1 / C.

    The bias is not penalised. It works on the objective divided by N, in the features' dtype, and stops when no entry
    of that gradient exceeds `tolerance`. `start` warm-starts it; without it W = 0 and b is the classes' log share.
    """
    num_examples, width = features_ND.shape
    labels_N = labels_N.long()
    # L-BFGS sees W times this, so that a strong penalty is as well conditioned as the bias that it does not reach
    stretch = (1.0 + l2 / num_examples) ** 0.5
    if start is None:
        counts_C = torch.bincount(labels_N, minlength=num_classes).to(features_ND.dtype)
        stretched_CD, bias_C = features_ND.new_zeros(num_classes, width), ((counts_C + 1) / num_examples).log()
    else:
        stretched_CD, bias_C = start.weight_CD * stretch, start.bias_C.clone()
    stretched_CD.requires_grad_()
    bias_C.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [stretched_CD, bias_C],
        max_iter=max_iterations,
        tolerance_grad=tolerance,
        # in float32 the objective stops changing before its gradient is that small
        tolerance_change=0.0 if features_ND.dtype == torch.float64 else 1e-9,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        weight_CD = stretched_CD / stretch
        loss = F.cross_entropy(F.linear(features_ND, weight_CD, bias_C), labels_N)
        loss = loss + l2 / (2 * num_examples) * weight_CD.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    num_iterations = int(optimizer.state[stretched_CD]["n_iter"])
    return LogisticFit(stretched_CD.detach() / stretch, bias_C.detach(), num_iterations)


def linear_probe(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_MD: Tensor,
    test_labels_M: Tensor,
    num_classes: int,
    generator: torch.Generator,
    val_fraction: float = 0.2,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
    progress: Progress | None = None,
) -> ProbeResult:
    """Choose l2 on a validation split of the training set, refit on all of it, and measure on the test set once.

    Every feature source is treated alike: centred on the training mean and divided by one number, the root mean square
    of the centred training features. With a free bias that leaves the set of classifiers and the penalty's shape as
    CLIP's; it only states l2 in the features' own scale, so that one grid serves them all, and it conditions L-BFGS.
    No channel is scaled on its own. float64 up to 2^24 numbers of training features, float32 above.

    The generator gives the split and the bootstrap. Raises ValueError for labels or features that do not fit together.
    """
    check_labelled(train_ND, train_labels_N, num_classes, "train")
    check_labelled(test_MD, test_labels_M, num_classes, "test")
    dtype = torch.float64 if train_ND.numel() <= _FLOAT64_MAX_ELEMENTS else torch.float32
    train_ND, test_MD = _condition(train_ND.to(dtype), test_MD.to(dtype))
    fit_index, val_index = (
        index.to(train_ND.device) for index in stratified_split(train_labels_N, val_fraction, generator)
    )
    if len(val_index) == 0:
        raise ValueError("no class has two training examples: there is nothing to validate on")
    sweep = _Sweep(
        train_ND[fit_index],
        train_labels_N[fit_index],
        train_ND[val_index],
        train_labels_N[val_index].long(),
        num_classes,
        max_iterations,
        tolerance,
        progress,
    )
    best = sweep.search()
    l2 = L2_GRID[best]
    final = fit_logistic(train_ND, train_labels_N, num_classes, l2, sweep.fits[best], max_iterations, tolerance)
    predictions_M = final.logits(test_MD).argmax(1)
    confusion_CC = confusion_matrix(predictions_M, test_labels_M, num_classes).cpu()
    recall_C = per_class_accuracy(confusion_CC)
    correct_M = predictions_M == test_labels_M
    return ProbeResult(
        accuracy=float(correct_M.double().mean()),
        accuracy_se=bootstrap_standard_error(correct_M, generator),
        mean_per_class=float(recall_C.nanmean()),
        per_class_accuracy=tuple(recall_C.tolist()),
        confusion_CC=confusion_CC,
        predictions_M=predictions_M.cpu(),
        l2=l2,
        validation_accuracy=sweep.scores[best][0],
        validation_curve=tuple((L2_GRID[step], sweep.scores[step][0]) for step in sorted(sweep.scores)),
        num_fit=len(fit_index),
        num_val=len(val_index),
        num_iterations=final.num_iterations,
    )


def _condition(train_ND: Tensor, test_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Centre both on the training mean and divide by the training root mean square: one number for all channels.

    Where there are more channels than training images, both are written in a basis of the training rows.
    """
    mean_D = train_ND.mean(0)
    scale = (train_ND - mean_D).square().mean().sqrt().clamp_min(torch.finfo(train_ND.dtype).tiny)
    train_ND, test_MD = (train_ND - mean_D) / scale, (test_MD - mean_D) / scale
    num_train, width = train_ND.shape
    if width <= num_train:
        return train_ND, test_MD
    # More channels than images: a penalised solution lies in the span of the training rows, so in an orthonormal basis
    # of that span it is the same classifier, with fewer numbers.
    basis_DN = torch.linalg.qr(train_ND.T).Q
    return train_ND @ basis_DN, test_MD @ basis_DN


class _Sweep:
    """Search for the step of `L2_GRID` with the highest validation accuracy, coarse to fine."""

    def __init__(
        self,
        fit_ND: Tensor,
        fit_labels_N: Tensor,
        val_MD: Tensor,
        val_labels_M: Tensor,
        num_classes: int,
        max_iterations: int,
        tolerance: float,
        progress: Progress | None,
    ) -> None:
        self.fit_ND, self.fit_labels_N = fit_ND, fit_labels_N
        self.val_MD, self.val_labels_M = val_MD, val_labels_M
        self.num_classes, self.max_iterations, self.tolerance = num_classes, max_iterations, tolerance
        self.progress = progress
        self.fits: dict[int, LogisticFit] = {}
        self.scores: dict[int, tuple[float, float]] = {}  # accuracy, then negative cross-entropy to break ties

    def search(self) -> int:
        """Try every second decade, then halve the stride around the best until the grid is met; 15 fits at most."""
        for step in range(len(L2_GRID) - 1, -1, -_COARSE_STRIDE):
            self._evaluate(step)
        stride = _COARSE_STRIDE
        while stride > 1:
            stride //= 2
            best = self._best()
            for step in (best + stride, best - stride):
                if 0 <= step < len(L2_GRID):
                    self._evaluate(step)
        return self._best()

    def _best(self) -> int:
        return max(self.scores, key=lambda step: (*self.scores[step], step))

    def _evaluate(self, step: int) -> None:
        nearest = min(self.fits, key=lambda other: (abs(other - step), -other), default=None)
        start = None if nearest is None else self.fits[nearest]
        fit = fit_logistic(
            self.fit_ND, self.fit_labels_N, self.num_classes, L2_GRID[step], start, self.max_iterations, self.tolerance
        )
        logits_MC = fit.logits(self.val_MD)
        accuracy = float((logits_MC.argmax(1) == self.val_labels_M).double().mean())
        self.fits[step] = fit
        self.scores[step] = (accuracy, -float(F.cross_entropy(logits_MC, self.val_labels_M)))
        if self.progress is not None:
            self.progress(L2_GRID[step], accuracy, fit.num_iterations)
