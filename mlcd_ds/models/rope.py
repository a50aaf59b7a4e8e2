"""Rotary positions in two dimensions, as Hugging Face's `MLCDVisionModel` has them.

A head's channels are turned in pairs (i, i + K/2): of the K/2 angles the first half goes with the patch's row, the
second with its column. The class token has learned angles. N patches, T = N + 1 tokens, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

THETA = 10_000.0


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines in fp32, [T, K] for all images alike or [B, 1, T, K]."""

    cosines: Tensor
    sines: Tensor

    def apply(self, heads_BHTK: Tensor) -> Tensor:
        """Turned queries or keys, in their own type; computed in fp32."""
        x = heads_BHTK.float() if heads_BHTK.dtype != torch.float64 else heads_BHTK
        first, second = x.chunk(2, dim=-1)
        turned = x * self.cosines + torch.cat([-second, first], dim=-1) * self.sines
        return turned.to(heads_BHTK.dtype)


class AxialRotary(nn.Module):
    """The angles of a square grid of patches, and the class token's own. Registers are not turned."""

    def __init__(self, head_dim: int, num_registers: int = 0) -> None:
        super().__init__()
        self.head_dim, self.num_registers = head_dim, num_registers
        self.class_pos_emb = nn.Parameter(torch.empty(1, head_dim // 2))

    def forward(self, grid: int, kept_BK: Tensor | None = None) -> Rotation:
        """The rotation of all tokens of `grid` x `grid` patches, or of these with the patches `kept_BK` alone."""
        device = self.class_pos_emb.device
        quarter = self.head_dim // 4
        exponents = torch.arange(quarter, device=device, dtype=torch.float32) / quarter
        places = torch.arange(grid, device=device, dtype=torch.float32)
        angles_GQ = torch.outer(places, THETA**-exponents)
        rows, columns = angles_GQ.repeat_interleave(grid, 0), angles_GQ.repeat(grid, 1)
        patches = torch.cat([rows, columns], dim=1)  # [N, K / 2]
        own = self.class_pos_emb if self.class_pos_emb.dtype == torch.float64 else self.class_pos_emb.float()
        first = torch.cat([own, own.new_zeros(self.num_registers, own.shape[1])])
        if kept_BK is None:
            angles = torch.cat([first, patches.to(own.dtype)])
        else:
            angles = torch.cat([first.expand(len(kept_BK), -1, -1), patches.to(own.dtype)[kept_BK]], dim=1)[:, None]
        doubled = torch.cat([angles, angles], dim=-1)
        return Rotation(doubled.cos(), doubled.sin())
