"""The gradient that the engine is given."""

from __future__ import annotations

import torch

from mlcd_ds.engine.gradients import GradientFactors, attach_gradient
from mlcd_ds.heads.partial_fc import HeadOutput


def test_an_attached_gradient_reaches_the_embeddings() -> None:
    output = HeadOutput(torch.tensor(2.5), {}, torch.tensor([[1.0, -2.0]]))
    factors = GradientFactors.of(num_micro_batches=4, data_parallel=3)
    emb_BE = torch.zeros(1, 2, requires_grad=True)
    loss = attach_gradient(emb_BE, output, factors)
    (loss * 0.5).backward()
    assert loss.item() == 2.5 and emb_BE.grad is not None and emb_BE.grad.tolist() == [[1.5, -3.0]]
    assert factors.rows == 0.25
