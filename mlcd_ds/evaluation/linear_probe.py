"""Linear probe on frozen features: logistic regression whose L2 is chosen on validation splits, after CLIP's.

CLIP's (Radford et al. 2021, A.3) uses one split; here several are drawn, and the accuracy is their mean.

Samples may be dealt over ranks, which keep them: what travels are labels, predictions and sums.

Shapes: N training samples, M test samples, of them n and m on this rank; D feature channels, C classes, S splits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mlcd_ds.evaluation.accuracy import bootstrap_standard_error, confusion_matrix, per_class_accuracy
from mlcd_ds.evaluation.features import check_labelled
from mlcd_ds.evaluation.logistic import LogisticFit, fit_logistic
from mlcd_ds.evaluation.ranks import ALONE, Ranks

L2_GRID = tuple(10.0 ** (-6 + step / 8) for step in range(97))  # 96 steps, 8 a decade
_COARSE_STRIDE = 16  # two decades, as CLIP starts
_FLOAT64_MAX_ELEMENTS = 2**24  # 128 MiB of features in float64

Progress = Callable[[float, float, int], None]
"""Called after each fit of the sweeps with l2, validation accuracy and iterations."""


@dataclass(frozen=True)
class SplitResult:
    """The l2 that one validation split chose, and its results."""

    l2: float
    accuracy: float  # on the test set, of the fit to all training samples with this l2
    validation_accuracy: float  # at the chosen l2
    validation_curve: tuple[tuple[float, float], ...]  # (l2, validation accuracy), l2 rising


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What a linear probe measured on the test set; accuracies and predictions are over all splits."""

    accuracy: float  # mean over the splits
    accuracy_se: float  # of that mean: sqrt(test_se^2 + split_sd^2 / S)
    test_se: float  # bootstrap over the test samples
    split_sd: float  # standard deviation of one split's accuracy
    mean_per_class: float  # over the classes with a test sample
    per_class_accuracy: tuple[float, ...]  # NaN for a class without a test sample
    confusion_CC: Tensor  # counts summed over the splits; row true, column predicted
    predictions_SM: Tensor
    splits: tuple[SplitResult, ...]
    num_fits: int
    num_unconverged: int  # fits, in sweeps or to all training samples, that ended unconverged


def stratified_split(labels_N: Tensor, val_fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return disjoint indices (fit, validation) that share every class in the same proportion, sorted, on the CPU.

    A class with two or more samples has at least one on either side; the only sample of a class goes to fit.
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


def linear_probe(
    train_nD: Tensor,
    train_labels_n: Tensor,
    test_mD: Tensor,
    test_labels_m: Tensor,
    num_classes: int,
    generator: torch.Generator,
    num_splits: int = 5,
    val_fraction: float = 0.2,
    max_iterations: int = 100,
    tolerance: float = 1e-6,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> ProbeResult:
    """Measure on the test set the fits to all training samples, each with the l2 that one validation split chose.

    Every feature source is treated alike: centred on the training mean and divided by one number, the root mean square
    of the centred training features. With a free bias that leaves the set of classifiers and the penalty's shape as
    CLIP's; it only states l2 in the features' own scale, so that one grid serves them all. No channel is scaled on its
    own. float64 up to 2^24 numbers of training features, float32 above.

    The generator gives the splits and the bootstrap. `max_iterations` and `tolerance` are `fit_logistic`'s. Raises
    ValueError for labels or features that do not fit together.

    With `ranks` each gives consecutive samples, some may have none; the splits are those of all in one process, and
    every rank returns the same result. Collectives: `fit_logistic`'s, gathered labels and predictions, sums.
    """
    check_labelled(train_nD, train_labels_n, num_classes, "train", ranks.size > 1)
    check_labelled(test_mD, test_labels_m, num_classes, "test", ranks.size > 1)
    if num_splits < 2:
        raise ValueError(f"num_splits {num_splits} must be 2 or more, for the error from the choice of the split")
    train_labels_N, test_labels_M = ranks.concat(train_labels_n), ranks.concat(test_labels_m)
    is_small = len(train_labels_N) * train_nD.shape[1] <= _FLOAT64_MAX_ELEMENTS
    dtype = torch.float64 if is_small else torch.float32
    train_nD, test_mD = _condition(train_nD.to(dtype), test_mD.to(dtype), ranks)
    first = sum(ranks.counts(len(train_nD), train_nD.device)[: ranks.rank])

    def own(index: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's part of the samples of an index."""
        index = index.to(train_nD.device) - first
        index = index[(index >= 0) & (index < len(train_nD))]
        return train_nD[index], train_labels_n[index]

    sweeps: list[_Sweep] = []
    chosen: list[int] = []
    for _ in range(num_splits):
        fit_index, val_index = stratified_split(train_labels_N, val_fraction, generator)
        if len(val_index) == 0:
            raise ValueError("no class has two training examples: there is nothing to validate on")
        sweeps.append(_Sweep(num_classes, max_iterations, tolerance, progress, ranks))
        chosen.append(sweeps[-1].search(*own(fit_index), *own(val_index)))
    finals = {
        step: fit_logistic(
            train_nD, train_labels_n, num_classes, L2_GRID[step], sweep.fits[step], max_iterations, tolerance, ranks
        )
        for step, sweep in dict(zip(chosen, sweeps, strict=True)).items()
    }
    predictions_mS = torch.stack([finals[step].logits(test_mD).argmax(1) for step in chosen], dim=1)
    predictions_SM = ranks.concat(predictions_mS).T
    correct_SM = predictions_SM == test_labels_M
    accuracy_S = correct_SM.double().mean(1)
    confusion_CC = confusion_matrix(predictions_SM.flatten(), test_labels_M.repeat(num_splits), num_classes).cpu()
    recall_C = per_class_accuracy(confusion_CC)
    test_se = bootstrap_standard_error(correct_SM.double().mean(0), generator)
    split_sd = float(accuracy_S.std())
    fits = [*finals.values(), *(fit for sweep in sweeps for fit in sweep.fits.values())]
    return ProbeResult(
        accuracy=float(accuracy_S.mean()),
        accuracy_se=(test_se**2 + split_sd**2 / num_splits) ** 0.5,
        test_se=test_se,
        split_sd=split_sd,
        mean_per_class=float(recall_C.nanmean()),
        per_class_accuracy=tuple(recall_C.tolist()),
        confusion_CC=confusion_CC,
        predictions_SM=predictions_SM.cpu(),
        splits=tuple(
            SplitResult(L2_GRID[step], accuracy, sweep.scores[step][0], sweep.curve())
            for step, accuracy, sweep in zip(chosen, accuracy_S.tolist(), sweeps, strict=True)
        ),
        num_fits=len(fits),
        num_unconverged=sum(not fit.is_converged for fit in fits),
    )


def _condition(train_nD: Tensor, test_mD: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Centre both on the training mean and divide by the training root mean square: one number for all channels.

    Both are then rotated to the training set's principal axes, where Newton's steps are cheap; that changes no
    classifier, and no penalty.
    """
    num_train = ranks.total(len(train_nD), train_nD.device)
    mean_D = ranks.sum(train_nD.sum(0)) / num_train
    train_nD, test_mD = train_nD - mean_D, test_mD - mean_D
    mean_square = ranks.sum(train_nD.square().sum(dtype=torch.float64)) / (num_train * train_nD.shape[1])
    scale = mean_square.sqrt().to(train_nD.dtype).clamp_min(torch.finfo(train_nD.dtype).tiny)
    train_nD, test_mD = train_nD / scale, test_mD / scale
    if train_nD.shape[1] > num_train:
        # More channels than images: a penalised solution lies in the span of the training rows, so in an orthonormal
        # basis of that span it is the same classifier, with fewer numbers. The rows are fewer than the channels, so
        # every rank can have them all.
        basis_DN = ranks.from_first(torch.linalg.qr(ranks.concat(train_nD).T).Q.contiguous())
        train_nD, test_mD = train_nD @ basis_DN, test_mD @ basis_DN
    axes_DD = ranks.from_first(torch.linalg.eigh(ranks.sum(train_nD.T @ train_nD)).eigenvectors.contiguous())
    return train_nD @ axes_DD, test_mD @ axes_DD


class _Sweep:
    """Search for the step of `L2_GRID` with the highest validation accuracy, coarse to fine."""

    def __init__(
        self, num_classes: int, max_iterations: int, tolerance: float, progress: Progress | None, ranks: Ranks
    ) -> None:
        self.num_classes, self.max_iterations, self.tolerance = num_classes, max_iterations, tolerance
        self.progress, self.ranks = progress, ranks
        self.fits: dict[int, LogisticFit] = {}
        self.scores: dict[int, tuple[float, float]] = {}  # accuracy, then negative cross-entropy to break ties

    def search(self, fit_nD: Tensor, fit_labels_n: Tensor, val_mD: Tensor, val_labels_m: Tensor) -> int:
        """Try every second decade, then halve the stride around the best until the grid is met; 15 fits at most.

        From strong to weak: two decades' steps in a row that are worse than the best end the first pass, as a weaker l2
        is fitted ever more slowly and would be worse still.
        """
        data = fit_nD, fit_labels_n, val_mD, val_labels_m.long()
        for step in range(len(L2_GRID) - 1, -1, -_COARSE_STRIDE):
            self._evaluate(step, *data)
            if self._best() >= step + 2 * _COARSE_STRIDE:
                break
        stride = _COARSE_STRIDE
        while stride > 1:
            stride //= 2
            best = self._best()
            for step in (best + stride, best - stride):
                if 0 <= step < len(L2_GRID):
                    self._evaluate(step, *data)
        return self._best()

    def curve(self) -> tuple[tuple[float, float], ...]:
        """(l2, validation accuracy) of every fit, l2 rising."""
        return tuple((L2_GRID[step], self.scores[step][0]) for step in sorted(self.scores))

    def _best(self) -> int:
        return max(self.scores, key=lambda step: (*self.scores[step], step))

    def _evaluate(self, step: int, fit_nD: Tensor, fit_labels_n: Tensor, val_mD: Tensor, val_labels_m: Tensor) -> None:
        # Of this split alone: at a weak l2 a fit to other examples is worse to start from than one at another l2.
        nearest = min(self.fits, key=lambda other: (abs(other - step), -other), default=None)
        start = None if nearest is None else self.fits[nearest]
        l2, ranks = L2_GRID[step], self.ranks
        fit = fit_logistic(
            fit_nD, fit_labels_n, self.num_classes, l2, start, self.max_iterations, self.tolerance, ranks
        )
        logits_mC = fit.logits(val_mD)
        num_correct = (logits_mC.argmax(1) == val_labels_m).double().sum()
        loss = F.cross_entropy(logits_mC, val_labels_m, reduction="sum").double()
        sums_3 = ranks.sum(torch.stack([num_correct, loss, num_correct.new_tensor(len(val_labels_m))]))
        accuracy, cross_entropy = (sums_3[:2] / sums_3[2]).tolist()
        self.fits[step] = fit
        self.scores[step] = (accuracy, -cross_entropy)
        if self.progress is not None:
            self.progress(l2, accuracy, fit.num_iterations)
