"""The labels that live on this rank, each scored by its own row-gathered dot product.

G images of all ranks, P labels an image, L classes on this rank, E embedding, K pairs (image, label); k: of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mlcd_ds.heads.centers import Centers
from mlcd_ds.heads.class_shards import ClassRange

BLOCK_PAIRS = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Positives:
    """Pairs (image, label) whose label lives here, as places in [G, P] and as rows of the head.

    Compact: K is their number, which on a GPU the host would have to wait for. Else K is G * P, and pairs that live
    elsewhere point to rows of this rank (spread out: additions to one row would queue) with `is_here_K` false.
    """

    places_K: Tensor
    rows_K: Tensor
    is_here_K: Tensor
    num_labels: int

    @staticmethod
    def find(labels_GP: Tensor, classes: ClassRange, *, is_compact: bool) -> Positives:
        """`labels_GP` int64 classes of all ranks, -1 for none."""
        labels_N = labels_GP.flatten()
        is_here_N = (labels_N >= classes.begin) & (labels_N < classes.end)
        if is_compact:
            places_K = is_here_N.nonzero().flatten()
        else:
            places_K = torch.arange(len(labels_N), device=labels_GP.device)
        rows_K = (labels_N[places_K] - classes.begin).remainder(len(classes))
        return Positives(places_K, rows_K, is_here_N[places_K], labels_GP.shape[1])

    def slots(self, rows_S: Tensor, num_rows: int, num_images: int) -> Tensor:
        """[G, P]: where in the sampled rows a label stands, -1 where it does not."""
        slots_L = torch.full((num_rows,), -1, dtype=torch.int64, device=rows_S.device)
        slots_L[rows_S] = torch.arange(len(rows_S), device=rows_S.device)
        slots_N = slots_L.new_full((num_images * self.num_labels,), -1)
        slots_N[self.places_K] = slots_L[self.rows_K].where(self.is_here_K, -1)
        return slots_N.view(num_images, self.num_labels)

    def cosines(self, emb_GE: Tensor, centers: Centers) -> Tensor:
        """[G, P]: cosines of the labels that live here, 0 elsewhere, so that a sum over ranks has them all."""
        dtype = torch.promote_types(emb_GE.dtype, torch.float32)
        cosines_N = emb_GE.new_zeros(len(emb_GE) * self.num_labels, dtype=dtype)
        for block in self._blocks():
            unit_kE, _ = centers.unit_rows(self.rows_K[block])
            cosines_k = (self._embeddings(block, emb_GE) * unit_kE).sum(dim=1)
            cosines_N[self.places_K[block]] = cosines_k * self.is_here_K[block]
        return cosines_N.view(len(emb_GE), self.num_labels)

    def add_emb_gradients(self, centers: Centers, slopes_GP: Tensor, grad_GE: Tensor) -> None:
        """Add slope * d cos / d embedding, the embedding taken as free (not as of unit length), to `grad_GE`."""
        for block in self._blocks():
            unit_kE, _ = centers.unit_rows(self.rows_K[block])
            images_k = self.places_K[block] // self.num_labels
            grad_GE.index_add_(0, images_k, unit_kE.mul_(self._slopes(block, slopes_GP)))

    def add_row_gradients(self, emb_GE: Tensor, centers: Centers, slopes_GP: Tensor) -> None:
        """Add slope * d cos / d w to the gradient of the labels' rows."""
        for block in self._blocks():
            rows_k = self.rows_K[block]
            along_kE = self._slopes(block, slopes_GP) * self._embeddings(block, emb_GE)
            centers.add_gradient(rows_k, along_kE, *centers.unit_rows(rows_k))

    def _blocks(self) -> Iterator[slice]:
        size = BLOCK_PAIRS[self.places_K.device.type]
        return (slice(first, first + size) for first in range(0, len(self.places_K), size))

    def _embeddings(self, block: slice, emb_GE: Tensor) -> Tensor:
        emb_kE = emb_GE[self.places_K[block] // self.num_labels]
        return emb_kE.to(torch.promote_types(emb_kE.dtype, torch.float32))

    def _slopes(self, block: slice, slopes_GP: Tensor) -> Tensor:
        """[k, 1], 0 for labels that live elsewhere."""
        return (slopes_GP.flatten()[self.places_K[block]] * self.is_here_K[block])[:, None]
