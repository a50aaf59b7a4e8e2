"""The fits of the linear probe against scikit-learn, and against Newton's method written from the definition."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mlcd_ds.evaluation.linear_probe import L2_GRID
from mlcd_ds.evaluation.logistic import LogisticFit, fit_logistic


def blobs(num: int, num_classes: int, width: int, distance: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian classes; the means depend on the shape only, the examples on the seed."""
    means = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99)) * distance
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num,), generator=generator)
    return means[labels] + torch.randn(num, width, generator=generator), labels


def like_the_demo(width: int) -> tuple[Tensor, Tensor]:
    """1,500 features of 11 classes, centred, of root mean square 1, their spectrum falling as a network's does."""
    features, labels = blobs(1500, 11, width, 0.2)
    features = features.double() * torch.arange(1, width + 1).double() ** -0.7
    features -= features.mean(0)
    return features / features.square().mean().sqrt(), labels


def objective(parameters: Tensor, features: Tensor, labels: Tensor, num_classes: int, l2: float) -> Tensor:
    """sum CE + l2 / 2 |W|^2 of the flat (W, b), written from the definition."""
    width = features.shape[1]
    weight, bias = parameters[: num_classes * width].reshape(num_classes, width), parameters[num_classes * width :]
    logits = features @ weight.T + bias
    nll = logits.logsumexp(1) - logits[torch.arange(len(labels)), labels]
    return nll.sum() + l2 / 2 * weight.square().sum()


def flat(fit: LogisticFit) -> Tensor:
    return torch.cat([fit.weight_CD.flatten(), fit.bias_C])


# scikit-learn's lbfgs needs minutes where newton-cg or newton-cholesky need seconds
@pytest.mark.parametrize(("width", "solver"), [(128, "newton-cholesky"), (1280, "newton-cg")])
def test_fits_equal_scikit_learn_over_the_grid(width: int, solver: str) -> None:
    """128 channels: examples that cannot be separated; 1,280: that can, where a weak l2's objective is near 0."""
    features, labels = like_the_demo(width)
    fit = None
    for step in (96, 48, 0):
        l2, start = L2_GRID[step], fit
        fit = fit_logistic(features, labels, 11, l2, start)
        theirs = LogisticRegression(C=1 / l2, solver=solver, tol=1e-9, max_iter=500)
        theirs.fit(features.numpy(), labels.numpy())
        parameters = torch.cat([torch.from_numpy(a).flatten() for a in (theirs.coef_, theirs.intercept_)])
        least = objective(parameters, features, labels, 11, l2)
        expected = torch.from_numpy(theirs.predict(features.numpy()))

        def agrees(ours: LogisticFit, least: Tensor = least, expected: Tensor = expected, l2: float = l2) -> bool:
            value = objective(flat(ours), features, labels, 11, l2)
            same = (ours.logits(features).argmax(1) == expected).double().mean()
            return bool(value <= least * (1 + 1e-5)) and float(same) >= 0.999

        assert fit.is_converged and agrees(fit), l2
        early = fit_logistic(features, labels, 11, l2, start, max_iterations=0 if step == 96 else 3)
        assert not early.is_converged and not agrees(early), f"known-bad twin: stopped early at {l2}"
    loose = fit_logistic(features, labels, 11, L2_GRID[0], start, tolerance=1e9)
    assert loose.num_iterations == 0 and not agrees(loose), "known-bad twin: a warm start that is taken as it is"


@pytest.mark.parametrize("l2", [1e-2, 1.0, 1e5])
def test_fit_equals_newton(l2: float) -> None:
    features, labels = blobs(60, 3, 4, 0.7)
    features = features.double()
    ours = flat(fit_logistic(features, labels, 3, l2, tolerance=1e-13))

    def value(parameters: Tensor) -> Tensor:
        return objective(parameters, features, labels, 3, l2)

    newton = torch.zeros(15, dtype=torch.float64)
    for _ in range(50):  # damped by the null direction of the bias only: adding a constant to it changes nothing
        step = torch.linalg.pinv(torch.func.hessian(value)(newton), rtol=1e-13) @ torch.func.grad(value)(newton)
        size = 1.0
        while value(newton - size * step) > value(newton) and size > 1e-9:
            size /= 2
        newton = newton - size * step
    ours[12:] -= ours[12:].mean()
    newton[12:] -= newton[12:].mean()
    assert (ours - newton).abs().max() < 1e-7
    assert torch.func.grad(value)(ours).abs().max() < 1e-8 * (len(labels) + l2)
    bad = flat(fit_logistic(features, labels, 3, l2 / 3, tolerance=1e-13))
    assert torch.func.grad(value)(bad).abs().max() > 1e-7 * (len(labels) + l2), "known-bad twin: another l2"


@pytest.mark.parametrize("width", [6, 800])  # a Hessian that is factorised, and one that is not
def test_warm_start_reaches_the_same_solution(width: int) -> None:
    features, labels = blobs(80, 3, width, 0.5)
    features = features.double()
    cold = fit_logistic(features, labels, 3, 0.1, tolerance=1e-12)
    warm = fit_logistic(features, labels, 3, 0.1, fit_logistic(features, labels, 3, 10.0), tolerance=1e-12)
    assert cold.is_converged and warm.is_converged
    assert (cold.weight_CD - warm.weight_CD).abs().max() < 1e-5
    assert fit_logistic(features, labels, 3, 0.1, cold, tolerance=1e-9).num_iterations == 0


def test_float32_agrees_with_float64() -> None:
    features, labels = blobs(200, 4, 10, 0.6)
    single = fit_logistic(features, labels, 4, 1.0)
    double = fit_logistic(features.double(), labels, 4, 1.0)
    assert single.is_converged
    assert (single.weight_CD - double.weight_CD).abs().max() < 5e-3
    bad = fit_logistic(features, labels, 4, 2.0)
    assert (bad.weight_CD - double.weight_CD).abs().max() > 3e-2, "known-bad twin: another l2"


def test_features_that_say_nothing_and_absent_classes_converge() -> None:
    labels = torch.arange(30) % 2
    fit = fit_logistic(torch.zeros(30, 3, dtype=torch.float64), labels, 3, 1.0)
    assert fit.is_converged and not fit.weight_CD.any()
    assert fit.logits(torch.zeros(1, 3, dtype=torch.float64)).softmax(1)[0, 2] < 1e-6
    with pytest.raises(ValueError, match="l2 0"):
        fit_logistic(torch.eye(2), torch.arange(2), 2, 0.0)


def test_a_start_that_is_worse_than_none_is_not_taken() -> None:
    """Where a Newton step from there overflows: examples that are told apart wrongly, and surely."""
    features, labels = blobs(36, 4, 32, 1.0)
    weight = 100 * torch.randn(4, 32, generator=torch.Generator().manual_seed(1)).double()
    warm = LogisticFit(weight, weight.new_zeros(4), 0.0, 1, True)
    plain = fit_logistic(features.double(), labels, 4, 1e-6)
    fit = fit_logistic(features.double(), labels, 4, 1e-6, warm)
    assert fit.is_converged and fit.objective == plain.objective
