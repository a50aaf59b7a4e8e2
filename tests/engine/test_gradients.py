"""The gradients that the engine is given."""

from __future__ import annotations

import pytest
import torch

from mlcd_ds.engine.gradients import GradientFactors, attach_gradient
from mlcd_ds.objectives.base import Given, join_outputs


def test_an_attached_gradient_reaches_each_output_that_is_given_one() -> None:
    given = Given(torch.tensor(2.5), {}, {"image": torch.tensor([[1.0, -2.0]]), "scale": torch.tensor(4.0)})
    factors = GradientFactors.of(num_micro_batches=4, data_parallel=3)
    outputs = {name: torch.zeros_like(gradient).requires_grad_() for name, gradient in given.gradients.items()}
    outputs["text"] = torch.zeros(1, 2, requires_grad=True)
    loss = attach_gradient(outputs, given, factors)
    (loss * 0.5).backward()
    assert loss.item() == 2.5 and outputs["image"].grad is not None and outputs["image"].grad.tolist() == [[1.5, -3.0]]
    assert outputs["scale"].grad is not None and outputs["scale"].grad.item() == 6.0
    assert outputs["text"].grad is None
    assert factors.own == 0.25


def test_a_batch_as_a_whole_is_given_its_gradient_once() -> None:
    """What the engine sums up over the micro-batches, each divided by their number, is what the objective gave."""
    rows_BE = torch.arange(12.0).view(6, 2)
    given = Given(torch.tensor(2.5), {}, {"image": rows_BE, "scale": torch.tensor(4.0)})
    whole = GradientFactors.of(num_micro_batches=3, data_parallel=2).of_whole(3)
    assert whole.own == 1.0
    leaves = {"image": torch.zeros(6, 2, requires_grad=True), "scale": torch.tensor(1.0, requires_grad=True)}
    for number, share in enumerate(given.shares(3)):
        outputs = {"image": leaves["image"][2 * number : 2 * number + 2], "scale": leaves["scale"] * 1}
        (attach_gradient(outputs, share, whole) / 3).backward()
    assert leaves["image"].grad is not None and torch.equal(leaves["image"].grad, 2 * rows_BE)
    assert leaves["scale"].grad is not None and leaves["scale"].grad.item() == pytest.approx(8.0)


def test_the_outputs_of_micro_batches_are_joined() -> None:
    parts = [{"image": torch.full((2, 1), float(n)), "scale": torch.tensor(7.0)} for n in range(2)]
    joined = join_outputs(parts)
    assert joined["image"].flatten().tolist() == [0.0, 0.0, 1.0, 1.0] and joined["scale"].item() == 7.0
