"""Learned positions for another resolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_positions(positions_TD: Tensor, num_patches: int) -> Tensor:
    """Learned positions [1 + N, D] of a square grid, resized to [1 + num_patches, D]: bicubic with antialiasing, the
    class token's as it is."""
    old, new = (round(count**0.5) for count in (len(positions_TD) - 1, num_patches))
    if old == new:
        return positions_TD
    grid_1DHW = positions_TD[1:].unflatten(0, (old, old)).permute(2, 0, 1)[None]
    if grid_1DHW.dtype.itemsize == 2:
        grid_1DHW = grid_1DHW.float()
    resized_1DHW = F.interpolate(grid_1DHW, (new, new), mode="bicubic", antialias=True, align_corners=False)
    patches_ND = resized_1DHW[0].flatten(1).T.to(positions_TD.dtype)
    return torch.cat([positions_TD[:1], patches_ND])
