"""How a step's gradients become those of its loss, the mean over the global batch, and how the engine is given them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlcd_ds.objectives.base import Given


@dataclass(frozen=True)
class GradientFactors:
    """The factors on a micro-batch's gradients, defined nowhere else.

    An objective gives the gradient of the mean over a micro-batch of all ranks: complete for its rank's embeddings, and
    for the rows of class centres that a rank owns.
    """

    own: float
    """1 / the number of micro-batches: what an objective keeps itself only adds up."""
    outputs: float
    """`engine.backward` divides by the number of micro-batches itself. The engine then averages over the data-parallel
    ranks, but the gradient of the mean over all images is their sum: hence the number of these ranks."""

    @classmethod
    def of(cls, num_micro_batches: int, data_parallel: int) -> GradientFactors:
        """For steps of so many micro-batches on so many data-parallel ranks."""
        return cls(own=1 / num_micro_batches, outputs=data_parallel)

    def of_whole(self, num_micro_batches: int) -> GradientFactors:
        """Where the objective saw all micro-batches at once: what it gave is of the mean over the global batch, so
        nothing is left of its own to average, and the engine's division must be undone."""
        return GradientFactors(own=1.0, outputs=self.outputs * num_micro_batches)


class _GivenGradient(torch.autograd.Function):
    """Forward: a loss computed elsewhere. Backward: its gradients, computed elsewhere too."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *outputs_and_gradients: Tensor) -> Tensor:
        ctx.save_for_backward(*outputs_and_gradients[len(outputs_and_gradients) // 2 :])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return (None, *(upstream * gradient for gradient in gradients), *(None for _ in gradients))


def attach_gradient(outputs: Mapping[str, Tensor], given: Given, factors: GradientFactors) -> Tensor:
    """A scalar loss for `engine.backward`, which hands each of the outputs the gradient that it was given."""
    names = [name for name in given.gradients if name in outputs]
    gradients = [given.gradients[name] * factors.outputs for name in names]
    return _GivenGradient.apply(given.loss, *(outputs[name] for name in names), *gradients)
