"""A rank's class centres as the loss sees them: some rows, and perhaps only some of their dimensions.

L classes on this rank, E embedding, F of its dimensions in use, n rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlcd_ds.heads.class_sampling import mixed_seed

EPS = 1e-12  # of torch.nn.functional.normalize


def to_unit(rows_nF: Tensor) -> tuple[Tensor, Tensor]:
    """Bring rows [n, F] to unit length, in place; returns them and their lengths before [n, 1]. Zeros stay zeros."""
    lengths_n1 = rows_nF.norm(dim=1, keepdim=True).clamp_min(EPS)
    return rows_nF.div_(lengths_n1), lengths_n1


def through_unit(grad_nF: Tensor, unit_nF: Tensor, lengths_n1: Tensor) -> Tensor:
    """The gradient of rows, from that of `to_unit`'s: its part along the row falls away.

    A row of zeros has no direction, and gets no gradient.
    """
    lengths_n1 = lengths_n1.where(lengths_n1 > EPS, torch.inf)
    return grad_nF.sub((grad_nF * unit_nF).sum(dim=1, keepdim=True) * unit_nF).div_(lengths_n1)


def scatter_features(part_nF: Tensor, features_F: Tensor | None, dim: int) -> Tensor:
    """Columns `features_F` of [n, E], the others zero; the argument where all are in use."""
    if features_F is None:
        return part_nF
    return part_nF.new_zeros(len(part_nF), dim).index_copy_(1, features_F, part_nF)


@dataclass(frozen=True)
class Centers:
    """Rows to read, and the gradient to add to. `features_F` None: all dimensions."""

    weight_LE: Tensor
    grad_LE: Tensor
    features_F: Tensor | None = None

    def unit_rows(self, rows_n: Tensor) -> tuple[Tensor, Tensor]:
        """Rows at unit length [n, F], and their lengths [n, 1]."""
        centers_nF = self.weight_LE[rows_n]
        if self.features_F is not None:
            centers_nF = centers_nF[:, self.features_F]
        return to_unit(centers_nF)

    def add_gradient(self, rows_n: Tensor, grad_nF: Tensor, unit_nF: Tensor, lengths_n1: Tensor) -> None:
        """Add the gradient of rows at unit length to that of the rows."""
        across_nF = through_unit(grad_nF, unit_nF, lengths_n1)
        self.grad_LE.index_add_(0, rows_n, scatter_features(across_nF, self.features_F, self.weight_LE.shape[1]))


def sample_features(dim: int, rate: float, seed: int, step: int, device: torch.device) -> Tensor | None:
    """UNICOM's random part of the embedding: sorted dimensions int64 [F], the same on every rank; None for all."""
    if rate == 1.0:
        return None
    generator = torch.Generator(device).manual_seed(mixed_seed(seed, step, -1))
    order_E = torch.randperm(dim, generator=generator, device=device)
    return order_E[: max(1, round(rate * dim))].sort().values
