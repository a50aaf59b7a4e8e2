"""The gradients that the engine is given."""

from __future__ import annotations

import pytest
import torch

from mlcd_ds.engine.gradients import GradientFactors, attach_gradient
from mlcd_ds.objectives.base import Given, join_fields, join_outputs

HEAD = torch.ones(3, 2)


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
    weights_KE = torch.arange(10.0).view(5, 2)  # an objective's own: as an output it has no row an image
    given = Given(torch.tensor(2.5), {}, {"raw_image": rows_BE, "scale": torch.tensor(4.0), "head": weights_KE})
    whole = GradientFactors.of(num_micro_batches=3, data_parallel=2).of_whole(3)
    assert whole.own == 1.0
    shapes = {"raw_image": (6, 2), "scale": (), "head": (5, 2)}
    leaves = {name: torch.zeros(shape, requires_grad=True) for name, shape in shapes.items()}
    for number, share in enumerate(given.shares(3)):
        rows = {"raw_image": leaves["raw_image"][2 * number : 2 * number + 2]}
        outputs = rows | {name: leaves[name] * 1 for name in ("scale", "head")}
        (attach_gradient(outputs, share, whole) / 3).backward()
    assert leaves["raw_image"].grad is not None and torch.equal(leaves["raw_image"].grad, 2 * rows_BE)
    assert leaves["head"].grad is not None and torch.allclose(leaves["head"].grad, 2 * weights_KE)
    assert leaves["scale"].grad is not None and leaves["scale"].grad.item() == pytest.approx(8.0)


def test_the_outputs_of_micro_batches_are_joined() -> None:
    parts = [{"image": torch.full((2, 1), float(n)), "scale": torch.tensor(7.0), "head": HEAD} for n in range(2)]
    joined = join_outputs(parts)
    assert joined["image"].flatten().tolist() == [0.0, 0.0, 1.0, 1.0] and joined["scale"].item() == 7.0
    assert joined["head"] is HEAD
    joined = join_fields([{"labels": torch.full((2,), n)} for n in range(2)])
    assert joined["labels"].tolist() == [0, 0, 1, 1]
