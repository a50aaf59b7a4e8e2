import pytest
import torch
from torch import Tensor

from mlcd_ds.evaluation.accuracy import bootstrap_standard_error, confusion_matrix, per_class_accuracy
from mlcd_ds.evaluation.linear_probe import L2_GRID, LogisticFit, fit_logistic, linear_probe, stratified_split


def blobs(num: int, num_classes: int, width: int, distance: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian classes; the means depend on the shape only, the examples on the seed."""
    means = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99)) * distance
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num,), generator=generator)
    return means[labels] + torch.randn(num, width, generator=generator), labels


def objective(parameters: Tensor, features: Tensor, labels: Tensor, num_classes: int, l2: float) -> Tensor:
    """sum CE + l2 / 2 |W|^2 of the flat (W, b), written from the definition."""
    width = features.shape[1]
    weight, bias = parameters[: num_classes * width].reshape(num_classes, width), parameters[num_classes * width :]
    logits = features @ weight.T + bias
    nll = logits.logsumexp(1) - logits[torch.arange(len(labels)), labels]
    return nll.sum() + l2 / 2 * weight.square().sum()


def flat(fit: LogisticFit) -> Tensor:
    return torch.cat([fit.weight_CD.flatten(), fit.bias_C])


@pytest.mark.parametrize("l2", [1e-2, 1.0, 1e5])
def test_fit_equals_newton(l2: float) -> None:
    features, labels = blobs(60, 3, 4, 0.7)
    features = features.double()
    ours = flat(fit_logistic(features, labels, 3, l2, tolerance=1e-11))

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
    assert torch.func.grad(value)(ours).abs().max() < 1e-8 * (len(labels) + l2)  # measured 1e-9 of it
    bad = flat(fit_logistic(features, labels, 3, l2 / 3, tolerance=1e-11))
    assert torch.func.grad(value)(bad).abs().max() > 1e-7 * (len(labels) + l2), "known-bad twin: another l2"


def test_warm_start_reaches_the_same_solution() -> None:
    features, labels = blobs(80, 3, 6, 0.5)
    features = features.double()
    cold = fit_logistic(features, labels, 3, 0.1, tolerance=1e-10)
    warm = fit_logistic(features, labels, 3, 0.1, fit_logistic(features, labels, 3, 10.0), tolerance=1e-10)
    assert (cold.weight_CD - warm.weight_CD).abs().max() < 1e-6
    assert fit_logistic(features, labels, 3, 0.1, cold, tolerance=1e-9).num_iterations == 0


def test_float32_agrees_with_float64() -> None:
    features, labels = blobs(200, 4, 10, 0.6)
    single = fit_logistic(features, labels, 4, 1.0)
    double = fit_logistic(features.double(), labels, 4, 1.0)
    assert (single.weight_CD - double.weight_CD).abs().max() < 5e-3  # measured 7e-4
    bad = fit_logistic(features, labels, 4, 2.0)
    assert (bad.weight_CD - double.weight_CD).abs().max() > 3e-2, "known-bad twin: another l2"


def test_separable_data_is_solved_and_the_curve_is_on_the_grid() -> None:
    train, labels = blobs(300, 4, 16, 4.0)
    test, test_labels = blobs(200, 4, 16, 4.0, seed=1)
    seen = []
    result = linear_probe(
        train, labels, test, test_labels, 4, torch.Generator().manual_seed(0),
        progress=lambda l2, accuracy, iterations: seen.append((l2, accuracy)),
    )  # fmt: skip
    assert result.accuracy == result.mean_per_class == 1.0 and result.accuracy_se == 0.0
    assert result.per_class_accuracy == (1.0,) * 4
    assert torch.equal(result.confusion_CC, torch.diag(torch.bincount(test_labels)))
    assert sorted(seen) == list(result.validation_curve) and len(seen) <= 15
    assert {L2_GRID[0], L2_GRID[48], L2_GRID[96]} <= {l2 for l2, _ in seen} <= set(L2_GRID)
    assert result.validation_accuracy == max(accuracy for _, accuracy in seen)


def test_shuffled_labels_give_chance() -> None:
    train, labels = blobs(400, 4, 16, 4.0)
    test, test_labels = blobs(400, 4, 16, 4.0, seed=1)
    shuffled = labels[torch.randperm(400, generator=torch.Generator().manual_seed(5))]
    generator = torch.Generator().manual_seed(0)
    result = linear_probe(train, shuffled, test, test_labels[torch.randperm(400, generator=generator)], 4, generator)
    assert abs(result.accuracy - 0.25) < 0.09  # four standard errors


def test_the_sweep_chooses_by_validation_and_beats_its_ends() -> None:
    """Few noisy examples in many dimensions: neither no penalty nor a crushing one is best."""
    train, labels = blobs(300, 5, 200, 0.12)
    test, test_labels = blobs(1000, 5, 200, 0.12, seed=1)
    result = linear_probe(train, labels, test, test_labels, 5, torch.Generator().manual_seed(0))
    curve = dict(result.validation_curve)
    assert 1e-2 < result.l2 < 1e5 and curve[result.l2] == max(curve.values()) > curve[L2_GRID[96]] + 0.1
    assert result.accuracy > 0.35


def test_neither_scale_nor_offset_of_the_features_matters() -> None:
    train, labels = blobs(200, 3, 12, 0.5)
    test, test_labels = blobs(200, 3, 12, 0.5, seed=1)
    plain, moved = (
        linear_probe(scale * train + shift, labels, scale * test + shift, test_labels, 3,
                     torch.Generator().manual_seed(0))
        for scale, shift in ((1.0, 0.0), (64.0, 128.0))
    )  # fmt: skip
    assert plain.l2 == moved.l2 and torch.equal(plain.predictions_M, moved.predictions_M)


def test_test_data_cannot_reach_training() -> None:
    """Garbage in the test set changes neither the chosen l2 nor the curve, and the split is of the training set."""
    train, labels = blobs(200, 3, 12, 0.5)
    test, test_labels = blobs(100, 3, 12, 0.5, seed=1)
    clean = linear_probe(train, labels, test, test_labels, 3, torch.Generator().manual_seed(0))
    garbage = torch.cat([test, 1e3 * torch.ones(50, 12)])
    garbage_labels = torch.cat([test_labels, torch.zeros(50, dtype=torch.long)])
    dirty = linear_probe(train, labels, garbage, garbage_labels, 3, torch.Generator().manual_seed(0))
    assert dirty.validation_curve == clean.validation_curve and dirty.l2 == clean.l2
    assert torch.equal(dirty.predictions_M[:100], clean.predictions_M)
    assert clean.num_fit + clean.num_val == 200
    again = linear_probe(train, labels, test, test_labels, 3, torch.Generator().manual_seed(0))
    assert torch.equal(again.predictions_M, clean.predictions_M) and again.accuracy_se == clean.accuracy_se
    other = linear_probe(train, labels, test, test_labels, 3, torch.Generator().manual_seed(1))
    assert other.validation_curve != clean.validation_curve, "known-bad twin: another seed, another split"


def test_split_is_stratified_and_disjoint() -> None:
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 2 + [3])
    fit, val = stratified_split(labels, 0.2, torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat([fit, val]).sort().values, torch.arange(63))
    assert torch.bincount(labels[val], minlength=4).tolist() == [10, 2, 1, 0]
    same, other = (stratified_split(labels, 0.2, torch.Generator().manual_seed(seed))[1] for seed in (0, 1))
    assert torch.equal(val, same) and not torch.equal(val, other)
    with pytest.raises(ValueError, match="val_fraction"):
        stratified_split(labels, 1.0, torch.Generator())
    with pytest.raises(ValueError, match="nothing to validate"):
        linear_probe(torch.eye(3), torch.arange(3), torch.eye(3), torch.arange(3), 3, torch.Generator())


def test_metrics() -> None:
    labels, predictions = torch.tensor([0, 0, 0, 1, 3]), torch.tensor([0, 0, 1, 1, 0])
    confusion = confusion_matrix(predictions, labels, 4)
    assert confusion.tolist() == [[2, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    recall = per_class_accuracy(confusion)
    assert recall[[0, 1, 3]].tolist() == [2 / 3, 1.0, 0.0] and recall[2].isnan()
    correct = torch.arange(400) < 300
    error = bootstrap_standard_error(correct, torch.Generator().manual_seed(0), 4000)
    assert error == pytest.approx((0.75 * 0.25 / 400) ** 0.5, rel=0.05)


def test_mean_per_class_leaves_out_absent_classes() -> None:
    train, labels = blobs(200, 4, 16, 4.0)
    test, test_labels = blobs(100, 4, 16, 4.0, seed=1)
    kept = test_labels != 2
    result = linear_probe(train, labels, test[kept], test_labels[kept], 4, torch.Generator().manual_seed(0))
    assert result.mean_per_class == 1.0 and result.per_class_accuracy[2] != result.per_class_accuracy[2]


def test_more_channels_than_images_give_the_classifier_of_the_full_space() -> None:
    """The rotation into the span of the training rows changes no prediction; leaving out a part of the span does."""
    train, labels = blobs(40, 3, 64, distance=0.25)
    test, test_labels = blobs(200, 3, 64, distance=0.25, seed=1)
    generator = torch.Generator().manual_seed(0)
    result = linear_probe(train, labels, test, test_labels, 3, generator)
    train, test = train.double(), test.double()
    mean = train.mean(0)
    scale = (train - mean).square().mean().sqrt()
    full = fit_logistic((train - mean) / scale, labels, 3, result.l2, tolerance=1e-9)
    logits = full.logits((test - mean) / scale)
    assert torch.equal(result.predictions_M, logits.argmax(1))
    basis = torch.linalg.qr((train - mean).T).Q[:, :20]
    partial = fit_logistic((train - mean) / scale @ basis, labels, 3, result.l2, tolerance=1e-9)
    assert not torch.equal(result.predictions_M, partial.logits((test - mean) / scale @ basis).argmax(1))
