"""Nearest centres on a GPU: one Triton kernel multiplies, and keeps the largest score of each tile of centres.

b rows and C centres, J = ceil(C / TILE) tiles of centres, E width, k centres wanted. Each of the k best scores lies in
one of the k tiles with the largest maxima. Only their members are scored again, in fp32; no other score reaches memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlcd_ds.clustering.assigner import Metric
from mlcd_ds.kernels.matmul import Matmul
from mlcd_ds.kernels.triton_product import NUM_WARPS, tile_product

BLOCK_ROWS = 8192  # rows whose maxima [b, J] exist at once
MEMBER_BYTES = 2**28  # of the centres that are gathered at once


@triton.jit
def tile_maxima_kernel(
    rows_ptr,
    centers_ptr,
    halves_ptr,
    maxima_ptr,
    num_rows,
    num_centers,
    num_features,
    num_tiles,
    has_halves: tl.constexpr,
    block_b: tl.constexpr,
    block_c: tl.constexpr,
    block_e: tl.constexpr,
):
    """One tile. `rows` [b, E], `centers` [C, E], `halves` fp32 [C], `maxima` fp32 [b, J]."""
    tile_b, tile_c = tl.program_id(0), tl.program_id(1)
    rows = tile_b * block_b + tl.arange(0, block_b)
    centers = tile_c * block_c + tl.arange(0, block_c)
    is_row, is_center = rows < num_rows, centers < num_centers
    rows64 = rows.to(tl.int64)
    scores = tile_product(
        rows_ptr,
        centers_ptr,
        rows64,
        centers.to(tl.int64),
        num_rows,
        num_centers,
        num_features,
        block_b,
        block_c,
        block_e,
    )
    if has_halves:
        scores = scores - tl.load(halves_ptr + centers, mask=is_center, other=0.0)[None, :]
    scores = tl.where(is_center[None, :], scores, float("-inf"))
    tl.store(maxima_ptr + rows64 * num_tiles + tile_c, tl.max(scores, axis=1), mask=is_row)


@dataclass
class TritonAssigner:
    """By `tile_maxima_kernel`, in tiles of `tile_shape`, then the members of the best tiles in fp32."""

    metric: Metric
    is_bf16: bool
    device: torch.device
    block_b: int
    block_c: int
    block_e: int

    def set_centers(self, centers_CE: Tensor) -> None:
        self._centers_CE = centers_CE.to(self.device).float().contiguous()
        self._factors_CE = self._cast(self._centers_CE)
        self._halves_C = self._centers_CE.square().sum(dim=1) / 2

    def _cast(self, rows: Tensor) -> Tensor:
        factors = Matmul(self.is_bf16, "cuda").cast(rows).contiguous()
        # Triton's interpreter multiplies the bit patterns of bf16: there, rounded values come as fp32.
        return factors if self.device.type == "cuda" else factors.float()

    def search(self, rows_BE: Tensor, k: int, squares_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores fp32 [B, k], largest first, and centres int64 [B, k]."""
        rows_BE = rows_BE.to(self.device).float().contiguous()
        scores_Bk = torch.empty(len(rows_BE), k, device=self.device)
        nearest_Bk = torch.empty(len(rows_BE), k, dtype=torch.int64, device=self.device)
        num_tiles = min(k, triton.cdiv(len(self._centers_CE), self.block_c))
        members = num_tiles * self.block_c * rows_BE.shape[1] * 4
        for begin in range(0, len(rows_BE), BLOCK_ROWS):
            maxima_bJ = self._tile_maxima(rows_BE[begin : begin + BLOCK_ROWS])
            tiles_bm = maxima_bJ.topk(num_tiles, dim=1, sorted=False).indices
            for part in torch.arange(len(tiles_bm), device=self.device).split(max(1, MEMBER_BYTES // members)):
                found = self._best_members(rows_BE[begin + part], tiles_bm[part], k)
                scores_Bk[begin + part], nearest_Bk[begin + part] = found
        return scores_Bk, nearest_Bk

    def _tile_maxima(self, rows_bE: Tensor) -> Tensor:
        """fp32 [b, J]."""
        num_rows, num_centers = len(rows_bE), len(self._centers_CE)
        grid = triton.cdiv(num_rows, self.block_b), triton.cdiv(num_centers, self.block_c)
        maxima_bJ = torch.empty(num_rows, grid[1], device=self.device)
        tile_maxima_kernel[grid](
            self._cast(rows_bE),
            self._factors_CE,
            self._halves_C,
            maxima_bJ,
            num_rows,
            num_centers,
            rows_bE.shape[1],
            grid[1],
            has_halves=self.metric == "euclidean",
            block_b=self.block_b,
            block_c=self.block_c,
            block_e=self.block_e,
            num_warps=NUM_WARPS,
        )
        return maxima_bJ

    def _best_members(self, rows_bE: Tensor, tiles_bm: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """fp32 [b, k] and int64 [b, k] of the members of m tiles."""
        members = torch.arange(self.block_c, device=self.device)
        numbers_bn = (tiles_bm[:, :, None] * self.block_c + members).flatten(1)
        is_center_bn = numbers_bn < len(self._centers_CE)
        numbers_bn = numbers_bn.where(is_center_bn, 0)
        scores_bn = torch.bmm(self._centers_CE[numbers_bn], rows_bE[:, :, None])[:, :, 0]
        if self.metric == "euclidean":
            scores_bn -= self._halves_C[numbers_bn]
        scores_bk, place_bk = scores_bn.where(is_center_bn, -torch.inf).topk(k, dim=1)
        return scores_bk, numbers_bn.gather(1, place_bk)
