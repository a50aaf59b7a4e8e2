"""The logits' block as one Triton kernel: product, exponential, mask and row sums, without a logit in memory.

g images and s classes of a block, E embedding (or the part of it in use), P labels an image. Tiles are
BLOCK_G x BLOCK_S, with the product's inner dimension cut into BLOCK_E.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlcd_ds.errors import UserError
from mlcd_ds.kernels.matmul import Matmul
from mlcd_ds.kernels.triton_product import NUM_WARPS, tile_product


@triton.jit
def exp_block_kernel(
    emb_ptr,
    scaled_ptr,
    slots_ptr,
    factors_ptr,
    exp_ptr,
    sums_ptr,
    num_images,
    num_classes,
    num_features,
    shift,
    num_labels: tl.constexpr,
    has_factors: tl.constexpr,
    block_g: tl.constexpr,
    block_s: tl.constexpr,
    block_e: tl.constexpr,
):
    """One tile. `emb` [g, E], `scaled` [s, E], `slots` int64 [g, P], `exp` [g, s], `sums` [tiles of s, g]."""
    tile_g, tile_s = tl.program_id(0), tl.program_id(1)
    images = tile_g * block_g + tl.arange(0, block_g)
    classes = tile_s * block_s + tl.arange(0, block_s)
    is_image, is_class = images < num_images, classes < num_classes
    images64, classes64 = images.to(tl.int64), classes.to(tl.int64)
    logits = tile_product(
        emb_ptr, scaled_ptr, images64, classes64, num_images, num_classes, num_features, block_g, block_s, block_e
    )
    keep = is_image[:, None] & is_class[None, :]
    for label in tl.static_range(num_labels):
        slots = tl.load(slots_ptr + images64 * num_labels + label, mask=is_image, other=-1)
        keep = keep & (slots[:, None] != classes64[None, :])
    values = tl.where(keep, tl.exp(logits - shift), 0.0)
    if has_factors:
        factors = tl.load(factors_ptr + images, mask=is_image, other=0.0)
        values = values * factors[:, None]
    else:
        # A partial sum for each tile, added up afterwards: atomic additions would come in another order each time.
        tl.store(sums_ptr + tile_s.to(tl.int64) * num_images + images, tl.sum(values, axis=1), mask=is_image)
    tl.store(
        exp_ptr + images64[:, None] * num_classes + classes64[None, :],
        values.to(exp_ptr.dtype.element_ty),
        mask=is_image[:, None] & is_class[None, :],
    )


@dataclass(frozen=True)
class TritonExpBlock:
    """The block by `exp_block_kernel`, in tiles of `tile_shape`. fp32 is not rounded to tf32."""

    matmul: Matmul
    block_g: int
    block_s: int
    block_e: int

    def __call__(
        self, emb_gE: Tensor, scaled_sE: Tensor, slots_gP: Tensor, shift: float, factors_g: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if emb_gE.dtype == torch.float64:
            raise UserError("head.kernel triton multiplies fp32 and bf16, not float64: set head.kernel=torch.")
        num_images, num_classes = len(emb_gE), len(scaled_sE)
        grid = triton.cdiv(num_images, self.block_g), triton.cdiv(num_classes, self.block_s)
        exp_gs = torch.empty(num_images, num_classes, dtype=emb_gE.dtype, device=emb_gE.device)
        sums_Tg = torch.empty(grid[1], num_images, dtype=torch.float32, device=emb_gE.device)
        exp_block_kernel[grid](
            emb_gE.contiguous(),
            scaled_sE.contiguous(),
            slots_gP.contiguous(),
            sums_Tg if factors_g is None else factors_g.contiguous(),
            exp_gs,
            sums_Tg,
            num_images,
            num_classes,
            emb_gE.shape[1],
            shift,
            num_labels=slots_gP.shape[1],
            has_factors=factors_g is not None,
            block_g=self.block_g,
            block_s=self.block_s,
            block_e=self.block_e,
            num_warps=NUM_WARPS,
        )
        return exp_gs, None if factors_g is not None else sums_Tg.sum(dim=0)
