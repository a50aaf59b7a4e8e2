import statistics

import pytest
import torch
from torch import Tensor

from mlcd_ds.evaluation.accuracy import bootstrap_standard_error, confusion_matrix, per_class_accuracy
from mlcd_ds.evaluation.linear_probe import L2_GRID, linear_probe, stratified_split
from mlcd_ds.evaluation.logistic import fit_logistic


def blobs(num: int, num_classes: int, width: int, distance: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian classes; the means depend on the shape only, the examples on the seed."""
    means = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99)) * distance
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num,), generator=generator)
    return means[labels] + torch.randn(num, width, generator=generator), labels


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
    assert torch.equal(result.confusion_CC, 5 * torch.diag(torch.bincount(test_labels)))
    curves = [split.validation_curve for split in result.splits]
    assert sorted(seen) == sorted(sum(curves, ())) and len(seen) <= 5 * 15 and result.num_unconverged == 0
    assert {L2_GRID[0], L2_GRID[48], L2_GRID[96]} <= {l2 for l2, _ in seen} <= set(L2_GRID)
    for split in result.splits:
        assert split.validation_accuracy == max(accuracy for _, accuracy in split.validation_curve)


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
    result = linear_probe(train, labels, test, test_labels, 5, torch.Generator().manual_seed(0), num_splits=2)
    for split in result.splits:
        curve = dict(split.validation_curve)
        assert 1e-2 < split.l2 < 1e5 and curve[split.l2] == max(curve.values()) > curve[L2_GRID[96]] + 0.1
    assert result.accuracy > 0.35


def test_neither_scale_nor_offset_of_the_features_matters() -> None:
    train, labels = blobs(200, 3, 12, 0.5)
    test, test_labels = blobs(200, 3, 12, 0.5, seed=1)
    plain, moved = (
        linear_probe(scale * train + shift, labels, scale * test + shift, test_labels, 3,
                     torch.Generator().manual_seed(0), num_splits=2)
        for scale, shift in ((1.0, 0.0), (64.0, 128.0))
    )  # fmt: skip
    assert [split.l2 for split in plain.splits] == [split.l2 for split in moved.splits]
    assert torch.equal(plain.predictions_SM, moved.predictions_SM)


def test_test_data_cannot_reach_training() -> None:
    """Garbage in the test set changes neither the chosen l2 nor the curve, and the split is of the training set."""
    train, labels = blobs(200, 3, 12, 0.5)
    test, test_labels = blobs(100, 3, 12, 0.5, seed=1)
    clean = linear_probe(train, labels, test, test_labels, 3, torch.Generator().manual_seed(0))
    garbage = torch.cat([test, 1e3 * torch.ones(50, 12)])
    garbage_labels = torch.cat([test_labels, torch.zeros(50, dtype=torch.long)])
    dirty = linear_probe(train, labels, garbage, garbage_labels, 3, torch.Generator().manual_seed(0))
    assert [(s.l2, s.validation_curve) for s in dirty.splits] == [(s.l2, s.validation_curve) for s in clean.splits]
    assert torch.equal(dirty.predictions_SM[:, :100], clean.predictions_SM)
    again = linear_probe(train, labels, test, test_labels, 3, torch.Generator().manual_seed(0))
    assert torch.equal(again.predictions_SM, clean.predictions_SM) and again.accuracy_se == clean.accuracy_se
    other = linear_probe(train, labels, test, test_labels, 3, torch.Generator().manual_seed(1))
    assert other.splits != clean.splits, "known-bad twin: another seed, other splits"


def test_the_error_includes_the_choice_of_the_split() -> None:
    """Few validation examples choose different l2, and the accuracies differ by more than the test images tell."""
    train, labels = blobs(60, 5, 200, 0.12)
    test, test_labels = blobs(4000, 5, 200, 0.12, seed=1)
    result = linear_probe(train, labels, test, test_labels, 5, torch.Generator().manual_seed(0))
    correct = result.predictions_SM == test_labels
    accuracies = [split.accuracy for split in result.splits]
    assert accuracies == correct.double().mean(1).tolist() and len({split.l2 for split in result.splits}) > 1
    assert result.accuracy == pytest.approx(sum(accuracies) / 5)
    assert result.split_sd == pytest.approx(statistics.stdev(accuracies)) and result.split_sd > 0
    assert result.accuracy_se == pytest.approx((result.test_se**2 + statistics.variance(accuracies) / 5) ** 0.5)
    assert result.accuracy_se > result.test_se, "known-bad twin: the bootstrap alone"
    for step in {split.l2 for split in result.splits}:  # one fit an l2: splits that agree on it predict alike
        alike = [row for row, split in zip(result.predictions_SM, result.splits, strict=True) if split.l2 == step]
        assert all(torch.equal(row, alike[0]) for row in alike)
    with pytest.raises(ValueError, match="num_splits 1"):
        linear_probe(train, labels, test, test_labels, 5, torch.Generator(), num_splits=1)


def test_fits_that_stop_early_are_counted() -> None:
    train, labels = blobs(200, 3, 12, 0.5)
    probes = [
        linear_probe(train, labels, train, labels, 3, torch.Generator().manual_seed(0), 2, max_iterations=limit)
        for limit in (100, 1)
    ]
    assert probes[0].num_unconverged == 0 < probes[1].num_unconverged <= probes[1].num_fits


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
    l2 = result.splits[0].l2
    full = fit_logistic((train - mean) / scale, labels, 3, l2, tolerance=1e-9)
    logits = full.logits((test - mean) / scale)
    assert torch.equal(result.predictions_SM[0], logits.argmax(1))
    basis = torch.linalg.qr((train - mean).T).Q[:, :20]
    partial = fit_logistic((train - mean) / scale @ basis, labels, 3, l2, tolerance=1e-9)
    assert not torch.equal(result.predictions_SM[0], partial.logits((test - mean) / scale @ basis).argmax(1))
