"""Nearest centres by a blocked product and a running maximum, in torch: no score outlives its block.

b rows and c centres of a block, seen as J strided chunks of CHUNK members; E width, k centres wanted. The maxima of
all chunks are taken first, at memory speed; single members are then read only for the rows and chunks that can still
matter. Each of the k best scores lies in one of the k chunks with the largest maxima, so nothing is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mlcd_ds.clustering.assigner import Metric
from mlcd_ds.kernels.matmul import Matmul

CHUNK = 32  # members of a chunk


@dataclass(frozen=True)
class BlockShape:
    """Rows and centres whose scores exist at once; centres are a multiple of CHUNK."""

    rows: int
    centers: int


# From docs/log.md: reading chunks again costs time for each row and block, so with fast bf16 products blocks are few
# and wide; fp32 prefers more rows. On a GPU a block should be a large product.
BLOCKS = {
    ("cpu", False): BlockShape(1024, 4096),
    ("cpu", True): BlockShape(256, 16_384),
    ("cuda", False): BlockShape(8192, 16_384),
    ("cuda", True): BlockShape(8192, 16_384),
}


class BlockwiseAssigner:
    """Exact up to the rounding of the products; the scores that it returns are fp32 even where products take bf16."""

    def __init__(self, metric: Metric, is_bf16: bool, device: torch.device) -> None:
        self._metric, self._device = metric, device
        self._matmul = Matmul(is_bf16, device.type)
        self._block = BLOCKS[device.type, is_bf16]

    def set_centers(self, centers_CE: Tensor) -> None:
        self._centers_CE = centers_CE.to(self._device).float()
        self._factors_CE = self._matmul.cast(self._centers_CE)
        self._halves_C = None  # |c|^2 / 2
        if self._metric == "euclidean":
            self._halves_C = self._centers_CE.square().sum(dim=1) / 2
        num_centers, size = len(centers_CE), self._block.centers
        # The last block is filled up to whole chunks with zeros, which are masked after the product.
        begin = num_centers // size * size
        rest = num_centers - begin
        self._tail_cE = self._factors_CE.new_zeros(-(-rest // CHUNK) * CHUNK, centers_CE.shape[1])
        self._tail_cE[:rest] = self._factors_CE[begin:]

    def _center_blocks(self) -> Iterator[tuple[int, Tensor, int]]:
        """First centre, factors [c, E], and how many of them are centres."""
        size = self._block.centers
        num_centers = len(self._centers_CE)
        for first in range(0, num_centers // size * size, size):
            yield first, self._factors_CE[first : first + size], size
        if len(self._tail_cE):
            yield num_centers // size * size, self._tail_cE, num_centers % size

    def search(self, rows_BE: Tensor, k: int, squares_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores fp32 [B, k], largest first, and centres int64 [B, k]."""
        assert k <= len(self._centers_CE)
        rows_BE = rows_BE.to(self._device).float()
        nearest_Bk = torch.empty(len(rows_BE), k, dtype=torch.int64, device=self._device)
        scores_Bk = torch.empty(len(rows_BE), k, device=self._device)
        buffer = torch.empty(self._block.rows * self._block.centers, device=self._device)
        with self._matmul.active():
            for begin in range(0, len(rows_BE), self._block.rows):
                block = slice(begin, begin + self._block.rows)
                nearest_Bk[block] = self._nearest(self._matmul.cast(rows_BE[block]), k, buffer)
                scores_Bk[block] = self._exact_scores(rows_BE[block], nearest_Bk[block])
        if k > 1:  # in the order of the exact scores
            scores_Bk, order_Bk = scores_Bk.sort(dim=1, descending=True, stable=True)
            nearest_Bk = nearest_Bk.gather(1, order_Bk)
        return scores_Bk, nearest_Bk

    def _nearest(self, rows_bE: Tensor, k: int, buffer: Tensor) -> Tensor:
        """int64 [b, k], the centres of largest score as the product rounds it."""
        best = RunningBest(len(rows_bE), k, self._device)
        for first, factors_cE, num_centers in self._center_blocks():
            scores_bc = self._product(rows_bE, factors_cE, buffer)
            if self._halves_C is not None:
                scores_bc[:, :num_centers] -= self._halves_C[first : first + num_centers]
            scores_bc[:, num_centers:] = -torch.inf
            best.update(scores_bc, first)
        return best.nearest_bk

    def _product(self, rows_bE: Tensor, factors_cE: Tensor, buffer: Tensor) -> Tensor:
        if rows_bE.dtype == torch.bfloat16:
            return self._matmul(rows_bE, factors_cE.T)
        scores_bc = buffer[: len(rows_bE) * len(factors_cE)].view(len(rows_bE), len(factors_cE))
        return torch.mm(rows_bE, factors_cE.T, out=scores_bc)

    def _exact_scores(self, rows_bE: Tensor, nearest_bk: Tensor) -> Tensor:
        """fp32 [b, k]: scores of the centres found, in fp32 without the product's rounding."""
        scores_bk = torch.stack([(rows_bE * self._centers_CE[column]).sum(dim=1) for column in nearest_bk.T], dim=1)
        return scores_bk if self._halves_C is None else scores_bk - self._halves_C[nearest_bk]


class RunningBest:
    """The k largest scores of each row so far, and their centres."""

    def __init__(self, num_rows: int, k: int, device: torch.device) -> None:
        self.scores_bk = torch.full((num_rows, k), -torch.inf, device=device)
        self.nearest_bk = torch.full((num_rows, k), -1, dtype=torch.int64, device=device)

    def update(self, scores_bc: Tensor, first: int) -> None:
        """Take in the scores of centres `first`, `first + 1`, ... -inf stands for no centre."""
        chunks_bJ = scores_bc.view(len(scores_bc), CHUNK, -1).amax(dim=1)  # member i of chunk j: column i * J + j
        k = self.scores_bk.shape[1]
        if k == 1:
            top_b, chunk_b = chunks_bJ.max(dim=1)
            top_b1, chunk_b1 = top_b[:, None], chunk_b[:, None]
        else:
            top_b1, chunk_b1 = chunks_bJ.topk(min(k, chunks_bJ.shape[1]), dim=1)
        rows_r = (top_b1[:, 0] > self.scores_bk[:, -1]).nonzero()[:, 0]
        if not len(rows_r):
            return
        self._look_into(scores_bc, rows_r, chunk_b1[rows_r], chunks_bJ.shape[1], first)

    def _look_into(self, scores_bc: Tensor, rows_r: Tensor, chunk_rm: Tensor, num_chunks: int, first: int) -> None:
        """Merge the members of m chunks of each of the rows."""
        members_i = torch.arange(CHUNK, device=scores_bc.device) * num_chunks
        columns_rn = (chunk_rm[:, :, None] + members_i).flatten(1)
        found_rn = scores_bc.view(-1)[rows_r[:, None] * scores_bc.shape[1] + columns_rn]
        k = self.scores_bk.shape[1]
        if k == 1:
            top_r1, place_r1 = found_rn.max(dim=1, keepdim=True)
            self.scores_bk[rows_r] = top_r1
            self.nearest_bk[rows_r] = first + columns_rn.gather(1, place_r1)
            return
        found_rn = torch.cat([self.scores_bk[rows_r], found_rn], dim=1)
        columns_rn = torch.cat([self.nearest_bk[rows_r], first + columns_rn], dim=1)
        self.scores_bk[rows_r], place_rk = found_rn.topk(k, dim=1)
        self.nearest_bk[rows_r] = columns_rn.gather(1, place_rk)
