"""Rows at unit length, and gradients through that: against autograd, and where a row is zero."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from distributed_harness import assert_close, assert_differs

from mlcd_ds.heads.centers import Centers, sample_features


def test_the_gradient_goes_through_unit_length() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    grad = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    weight[4] = 0
    rows = torch.tensor([1, 4, 5])
    centers = Centers(weight, torch.zeros_like(weight))
    unit, lengths = centers.unit_rows(rows)
    centers.add_gradient(rows, grad, unit, lengths)
    whole = weight.clone().requires_grad_()
    F.normalize(whole[[1, 5]]).backward(grad[[0, 2]])
    assert not unit[1].any() and not centers.grad_LE[4].any(), "a row of zeros has no direction, and gets no gradient"
    assert_close("gradient", centers.grad_LE, whole.grad, 1e-12)
    assert_differs("without the projection", torch.zeros(6, 5).double().index_add(0, rows, grad), whole.grad, 1e-2)


def test_the_dimensions_in_use_are_as_many_as_asked_for() -> None:
    for dim, rate, wanted in ((32, 0.25, 8), (32, 0.01, 1), (10, 0.36, 4)):
        features_F = sample_features(dim, rate, seed=3, step=1, device=torch.device("cpu"))
        assert features_F is not None and len(features_F) == wanted == len(features_F.unique())
        assert features_F.tolist() == sorted(features_F.tolist()) and features_F.max() < dim
    assert sample_features(32, 1.0, seed=3, step=1, device=torch.device("cpu")) is None
