"""The interface to a search for nearest centres. choose_assigner.py picks one of its implementations.

B rows of a block, C centres, E width, k centres wanted. A *score* is larger for a nearer centre: `x . c` for cosine,
`x . c - |c|^2 / 2` for euclidean, so that `|x - c|^2 = |x|^2 - 2 score`.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

Metric = Literal["cosine", "euclidean"]
AssignerName = Literal["auto", "faiss", "torch", "triton"]
Precision = Literal["auto", "fp32", "bf16"]


def row_squares(rows_BE: Tensor) -> Tensor:
    """|x|^2 [B], without a square [B, E] in memory."""
    return torch.linalg.vector_norm(rows_BE, dim=1).square()


class Assigner(Protocol):
    """Finds, for rows [B, E], the `k` centres of largest score; k is at most C."""

    def set_centers(self, centers_CE: Tensor) -> None:
        """Take fp32 centres [C, E]."""

    def search(self, rows_BE: Tensor, k: int, squares_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores fp32 [B, k], largest first, and centres int64 [B, k]. `squares_B`: |x|^2, where the caller has it."""
