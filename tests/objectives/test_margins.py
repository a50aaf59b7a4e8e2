"""Margins: values by the angle, true gradients, monotone."""

from __future__ import annotations

import math

import pytest
import torch
from distributed_harness import assert_close, assert_differs

from mlcd_ds.objectives.margins import least_cosine, with_margin

FORMS = ("cosface", "arcface", "none")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("margin", [0.0, 0.3, 0.9])
def test_gradients_are_true(form: str, margin: float) -> None:
    cosine = torch.linspace(-0.995, 0.995, 41, dtype=torch.float64)
    cosine = cosine[(cosine + math.cos(margin)).abs() > 1e-3].requires_grad_()  # arcface has a kink there
    assert torch.autograd.gradcheck(lambda c: with_margin(c, margin, form), cosine)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("margin", [0.0, 0.3, 0.9])
def test_values_rise_with_the_cosine_from_the_least_one(form: str, margin: float) -> None:
    cosine = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    value = with_margin(cosine, margin, form)
    assert (value.diff() > 0).all()
    # The floor under the sine: measured 3.2e-5 * sin(margin) at both ends.
    assert abs(value[0].item() - least_cosine(margin, form)) < 4e-5
    assert (value <= cosine + 1e-12).all(), "a margin makes positives harder"


def test_arcface_adds_to_the_angle_and_goes_on_as_a_line() -> None:
    angle = torch.linspace(0.01, math.pi - 0.31, 100, dtype=torch.float64)
    # float64: measured 5e-16
    assert_close("arcface", with_margin(torch.cos(angle), 0.3, "arcface"), torch.cos(angle + 0.3), 1e-13)
    assert_differs("cosface", with_margin(torch.cos(angle), 0.3, "cosface"), torch.cos(angle + 0.3), 1e-13)
    beyond = torch.linspace(-1, -math.cos(0.3) - 1e-9, 50, dtype=torch.float64)
    assert_close("line", with_margin(beyond, 0.3, "arcface"), beyond - 1 + math.cos(0.3), 1e-13)
    edge = torch.tensor([-math.cos(0.3) - 1e-10, -math.cos(0.3) + 1e-10], dtype=torch.float64)
    assert with_margin(edge, 0.3, "arcface").diff().abs() < 1e-9, "both parts meet"


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_finite_at_both_ends_in_fp32(form: str) -> None:
    cosine = torch.tensor([-1.0, 1.0, 1.0 + 1e-6, -1.0 - 1e-6], requires_grad=True)
    with_margin(cosine, 0.3, form).sum().backward()
    assert torch.isfinite(cosine.grad).all()
