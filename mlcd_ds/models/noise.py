"""Random numbers inside the model that belong to an image, not to a rank or a call.

An image's key and a counter are hashed. So drop path and token dropping are the same on any number of ranks, in any
micro-batches, when a block is computed a second time, and after a restart; and no generator's state has to be saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
TOKEN_MULTIPLE = 8


def uniforms(keys_B: Tensor, stream: int, count: int) -> Tensor:
    """[B, count] fp32 in [0, 1), from int64 keys in [0, 2^32); streams are independent of each other."""
    counters = torch.arange(1, count + 1, device=keys_B.device) + (stream << 20)
    mixed = _mix32((_mix32(keys_B)[:, None] + counters * 0x9E3779B9) & MASK)
    return (mixed >> 8).float() * 2.0**-24


def _mix32(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers without visible structure (two multiply-xorshift rounds), held in int64."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & MASK
    return x ^ (x >> 16)


@dataclass(frozen=True, eq=False)
class TrainingNoise:
    """What a training step does to a model: rates, and the images' keys [B]."""

    keys_B: Tensor
    drop_path: float = 0.0
    token_drop: float = 0.0

    def __eq__(self, other: object) -> bool:
        """Whether both would do the same: DeepSpeed compares what the ranks of a tensor-parallel group are given."""
        return (
            isinstance(other, TrainingNoise)
            and (self.drop_path, self.token_drop) == (other.drop_path, other.token_drop)
            and torch.equal(self.keys_B.cpu(), other.keys_B.cpu())
        )

    def branch_scales(self, depth: int) -> Tensor | None:
        """[B, depth, 2]: factors on the two branches of each block. None without drop path.

        Stochastic depth (arXiv 1603.09382): the rate grows linearly with depth, up to `drop_path` at the last block; a
        branch that stays is divided by its chance to stay.
        """
        if not self.drop_path:
            return None
        rates_L1 = torch.arange(1, depth + 1, device=self.keys_B.device)[:, None] * (self.drop_path / depth)
        stays_BL2 = uniforms(self.keys_B, 0, 2 * depth).view(-1, depth, 2) >= rates_L1
        return stays_BL2 / (1 - rates_L1)

    def kept_patches(self, num_patches: int, num_other: int = 1) -> Tensor | None:
        """Sorted indices [B, K] of the patches that stay, K the same for each image. None without token dropping.

        `num_other`: tokens that are not patches, of which none is dropped.
        """
        if not self.token_drop:
            return None
        kept = num_kept(num_patches, self.token_drop, num_other)
        return uniforms(self.keys_B, 1, num_patches).argsort(dim=1)[:, :kept].sort(dim=1).values


def num_kept(num_patches: int, token_drop: float, num_other: int = 1) -> int:
    """How many patches stay: all tokens together are a multiple of 8, as kernels like it, where that is near enough."""
    kept = max(1, round(num_patches * (1 - token_drop)))
    if not token_drop or kept + num_other < 2 * TOKEN_MULTIPLE:
        return kept
    suited = round((kept + num_other) / TOKEN_MULTIPLE) * TOKEN_MULTIPLE - num_other
    return suited if suited <= num_patches else suited - TOKEN_MULTIPLE
