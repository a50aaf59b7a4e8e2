"""Multinomial logistic regression by Newton's method, solved until a bound on what is left to gain is small.

Samples may be dealt over ranks: each adds up losses, gradients and curvatures of its own, and one all-reduce of [C, E]
makes the sums. Features never travel.

Shapes: n samples on this rank, N on all; D feature channels, C classes, E = D + 1 channels (the last is 1, its weight
the bias).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mlcd_ds.evaluation.ranks import ALONE, Ranks

_DIRECT_MAX_PARAMETERS = 2048  # of a Hessian that is formed and factorised: 32 MiB
_ROWS_A_BLOCK = 4096  # of the samples while it is formed
_ROWS_A_LOSS = 2**16  # of the samples whose loss is computed in float64 at a time
_MAX_CG_STEPS = 2000
_MAX_HALVINGS = 40


@dataclass(frozen=True, eq=False)
class LogisticFit:
    """A multinomial logistic regression: logits = features @ weight_CD.T + bias_C."""

    weight_CD: Tensor
    bias_C: Tensor
    objective: float
    num_iterations: int
    is_converged: bool

    def logits(self, features_ND: Tensor) -> Tensor:
        """Return the logits [N, C]."""
        return F.linear(features_ND, self.weight_CD, self.bias_C)


def fit_logistic(
    features_nD: Tensor,
    labels_n: Tensor,
    num_classes: int,
    l2: float,
    start: LogisticFit | None = None,
    max_iterations: int = 100,
    tolerance: float = 1e-6,
    ranks: Ranks = ALONE,
) -> LogisticFit:
    """Minimise f = sum_i CE(logits_i, label_i) + l2 / 2 * |W|^2; l2 > 0 is scikit-learn's 1 / C, the bias is free.

    It has converged when f is within `tolerance` of its minimum, relative to f and to what W gains over W = 0,
    whichever is less: the one decides at a weak l2, the other at a strong one. f is l2-strongly convex in W, which
    bounds the distance to the minimum by the gradient (see `_Problem.gap`), wherever the fit started.

    Newton's steps are solved directly where there are few parameters, else by conjugate gradients, which are fastest
    if the features' channels are uncorrelated. It computes in the features' dtype: float32 may not reach a weak l2's
    minimum, and says so in `is_converged`.

    With `ranks` the samples are those of all ranks, and so is the fit, up to the rounding of sums in another order
    (`tests/evaluation/test_ranks.py`). Collectives: all-reduces of [C, E], one an evaluation and one a step of
    conjugate gradients, and of single numbers, by which all ranks decide as rank 0.
    """
    problem = _Problem(features_nD, labels_n, num_classes, l2, ranks)
    theta_CE = problem.start()
    objective, grad_CE, probs_nC = problem.at(theta_CE)
    if start is not None:
        warm_CE = torch.cat([start.weight_CD, start.bias_C[:, None]], dim=1)
        warm = problem.at(warm_CE)
        if problem.decide(
            warm[0] < objective
        ):  # fitted to other samples, at a weak l2, it may be worse than the default start
            theta_CE, (objective, grad_CE, probs_nC) = warm_CE, warm
    iteration = 0
    while not (converged := problem.is_converged(objective, grad_CE, theta_CE, tolerance)):
        if iteration == max_iterations:
            break
        step_CE = _newton_step(problem, objective, grad_CE, probs_nC)
        slope = float((grad_CE * step_CE).sum())
        for _ in range(_MAX_HALVINGS):
            moved_CE = theta_CE + step_CE
            moved = problem.at(moved_CE)
            if problem.decide(moved[0] <= objective + 1e-4 * slope + problem.rounding):
                break
            step_CE, slope = step_CE / 2, slope / 2
        else:
            break  # nothing lower along the step: the gradient is rounding error
        theta_CE, (objective, grad_CE, probs_nC) = moved_CE, moved
        iteration += 1
    return LogisticFit(theta_CE[:, :-1], theta_CE[:, -1], objective, iteration, converged)


class _Problem:
    """The objective for one l2: its value, gradient and curvature."""

    def __init__(self, features_nD: Tensor, labels_n: Tensor, num_classes: int, l2: float, ranks: Ranks) -> None:
        if l2 <= 0:
            raise ValueError(f"l2 {l2} must be positive")
        self.ranks, self.device = ranks, features_nD.device
        self.features_nE = torch.cat([features_nD, features_nD.new_ones(len(features_nD), 1)], dim=1)
        self.labels_n = labels_n.long()
        self.one_hot_nC = features_nD.new_zeros(len(labels_n), num_classes)
        self.one_hot_nC.scatter_(1, self.labels_n[:, None], 1.0)
        self.l2 = l2
        self.l2_E = features_nD.new_full((self.features_nE.shape[1],), l2)
        self.l2_E[-1] = 0.0
        self.count_C = ranks.sum(self.one_hot_nC.sum(0, dtype=torch.float64))
        self.num_samples = float(self.count_C.sum())
        self.mean_square_E = ranks.sum(self.features_nE.square().sum(0)) / self.num_samples
        share_C = self.count_C / self.num_samples
        self.objective_without_features = -self.num_samples * float(torch.special.xlogy(share_C, share_C).sum())
        self.rounding = torch.finfo(features_nD.dtype).eps * self.objective_without_features

    def start(self) -> Tensor:
        """W = 0 and, as bias, the classes' log share."""
        theta_CE = self.features_nE.new_zeros(self.one_hot_nC.shape[1], self.features_nE.shape[1])
        theta_CE[:, -1] = ((self.count_C + 1) / self.num_samples).log()
        return theta_CE

    def decide(self, answer: bool) -> bool:
        """Rank 0's answer: the ranks' own may differ where their arithmetic rounds differently."""
        return bool(self.ranks.agree(float(answer), self.device))

    def at(self, theta_CE: Tensor) -> tuple[float, Tensor, Tensor]:
        """Objective, gradient [C, E] and this rank's probabilities [n, C]."""
        logits_nC = F.linear(self.features_nE, theta_CE)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for logits_bC, labels_b in zip(logits_nC.split(_ROWS_A_LOSS), self.labels_n.split(_ROWS_A_LOSS), strict=True):
            loss += F.cross_entropy(logits_bC.double(), labels_b, reduction="sum")
        objective = float(self.ranks.sum(loss)) + self.l2 / 2 * float(theta_CE[:, :-1].double().square().sum())
        probs_nC = logits_nC.softmax(1)
        grad_CE = self.ranks.sum((probs_nC - self.one_hot_nC).T @ self.features_nE)
        return objective, grad_CE + self.l2_E * theta_CE, probs_nC

    def curvature(self, probs_nC: Tensor, step_CE: Tensor) -> Tensor:
        """The Hessian's product with a step."""
        change_nC = F.linear(self.features_nE, step_CE)
        change_nC = probs_nC * (change_nC - (probs_nC * change_nC).sum(1, keepdim=True))
        return self.ranks.sum(change_nC.T @ self.features_nE) + self.l2_E * step_CE

    def hessian(self, probs_nC: Tensor) -> Tensor:
        """The Hessian [CE, CE], made regular: with a penalty on the sum of the bias, which no step changes."""
        num_classes, width = probs_nC.shape[1], self.features_nE.shape[1]
        hessian = self.features_nE.new_zeros(num_classes, width, num_classes, width)
        for rows_bE, probs_bC in zip(self.features_nE.split(_ROWS_A_BLOCK), probs_nC.split(_ROWS_A_BLOCK), strict=True):
            weighted_bCE = probs_bC[:, :, None] * rows_bE[:, None, :]
            weighted = weighted_bCE.flatten(1)
            hessian -= (weighted.T @ weighted).view_as(hessian)
            for label in range(num_classes):
                hessian[label, :, label] += weighted_bCE[:, label].T @ rows_bE
        hessian = self.ranks.sum(hessian)
        hessian[:, -1, :, -1] += self.num_samples
        return hessian.flatten(2).flatten(0, 1) + self.l2_E.repeat(num_classes).diag()

    def diagonal(self, probs_nC: Tensor) -> Tensor:
        """The Hessian's diagonal [C, E], as if a sample's probabilities were independent of its features."""
        weight_C = self.ranks.sum((probs_nC * (1 - probs_nC)).sum(0))
        diagonal_CE = weight_C[:, None] * self.mean_square_E + self.l2_E
        return diagonal_CE.clamp_min(torch.finfo(probs_nC.dtype).tiny)

    def gap(self, grad_CE: Tensor, theta_CE: Tensor) -> float:
        """Bound on objective - minimum: |dW|^2 / (2 l2), plus |db|_1 times how far the bias may be from its best.

        With dW = db = 0 for the rest it is the duality gap. The bias is taken to be within its own size (or 1) of it.
        """
        weights = float(grad_CE[:, :-1].double().square().sum()) / (2 * self.l2)
        return weights + float(grad_CE[:, -1].abs().sum()) * max(1.0, float(theta_CE[:, -1].abs().max()))

    def is_converged(self, objective: float, grad_CE: Tensor, theta_CE: Tensor, tolerance: float) -> bool:
        """Whether the gap is small beside the objective and beside what the features gained."""
        scale = min(objective, self.objective_without_features - objective)
        return self.decide(self.gap(grad_CE, theta_CE) <= tolerance * scale + self.rounding)


def _newton_step(problem: _Problem, objective: float, grad_CE: Tensor, probs_nC: Tensor) -> Tensor:
    """Solve Hessian @ step = -gradient."""
    if grad_CE.numel() <= _DIRECT_MAX_PARAMETERS and grad_CE.dtype == torch.float64:
        factor, failed = torch.linalg.cholesky_ex(problem.hessian(probs_nC))
        if problem.decide(not failed):
            return -torch.cholesky_solve(grad_CE.reshape(-1, 1), factor).view_as(grad_CE)
    return _conjugate_gradients(problem, objective, grad_CE, probs_nC)


def _conjugate_gradients(problem: _Problem, objective: float, grad_CE: Tensor, probs_nC: Tensor) -> Tensor:
    """The step by preconditioned conjugate gradients, solved more closely as the minimum gets nearer."""
    diagonal_CE = problem.diagonal(probs_nC)
    step_CE, residual_CE = torch.zeros_like(grad_CE), -grad_CE
    scaled_CE = residual_CE / diagonal_CE
    direction_CE = scaled_CE
    size = first = float((residual_CE * scaled_CE).sum())
    target = first * min(0.01, first / objective)
    for _ in range(_MAX_CG_STEPS):
        curved_CE = problem.curvature(probs_nC, direction_CE)
        curvature = float((direction_CE * curved_CE).sum())
        if curvature <= 0:  # rounding error: the Hessian is positive
            length, residual_CE = 0.0, torch.zeros_like(residual_CE)
        else:
            length, residual_CE = size / curvature, residual_CE - size / curvature * curved_CE
        step_CE = step_CE + length * direction_CE
        scaled_CE = residual_CE / diagonal_CE
        previous, size = size, float((residual_CE * scaled_CE).sum())
        if problem.decide(size <= target):
            break
        direction_CE = scaled_CE + size / (previous or 1.0) * direction_CE
    step_CE[:, -1] -= step_CE[:, -1].mean()  # adding a constant to the bias changes nothing
    return step_CE
