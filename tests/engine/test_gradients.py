"""The gradients that the engine is given."""

from __future__ import annotations

import torch

from mlcd_ds.engine.gradients import GradientFactors, attach_gradient
from mlcd_ds.objectives.base import Given


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
    assert factors.rows == 0.25
