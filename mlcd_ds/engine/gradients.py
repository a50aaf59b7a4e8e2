"""How a step's gradients become those of its loss, the mean over the global batch, and how the engine is given them.

B images of a micro-batch on this rank, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlcd_ds.heads.partial_fc import HeadOutput


@dataclass(frozen=True)
class GradientFactors:
    """The factors on a micro-batch's gradients, defined nowhere else.

    The head gives the gradient of the mean over a micro-batch of all ranks: complete for the rows that a rank owns, and
    for its embeddings.
    """

    rows: float
    """1 / the number of micro-batches: the head only adds up their gradients."""
    embeddings: float
    """`engine.backward` divides by the number of micro-batches itself. The engine then averages over the data-parallel
    ranks, but the gradient of the mean over all images is their sum: hence the number of these ranks."""

    @classmethod
    def of(cls, num_micro_batches: int, data_parallel: int) -> GradientFactors:
        """For steps of so many micro-batches on so many data-parallel ranks."""
        return cls(rows=1 / num_micro_batches, embeddings=data_parallel)


class _GivenGradient(torch.autograd.Function):
    """Forward: a loss computed elsewhere. Backward: its gradient, computed elsewhere too."""

    @staticmethod
    def forward(ctx: Any, emb_BE: Tensor, loss: Tensor, emb_grad_BE: Tensor) -> Tensor:
        ctx.save_for_backward(emb_grad_BE)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (emb_grad_BE,) = ctx.saved_tensors
        return upstream * emb_grad_BE, None, None


def attach_gradient(emb_BE: Tensor, output: HeadOutput, factors: GradientFactors) -> Tensor:
    """A scalar loss for `engine.backward`, which hands the embeddings their gradient."""
    return _GivenGradient.apply(emb_BE, output.loss, output.emb_grad_BE * factors.embeddings)
