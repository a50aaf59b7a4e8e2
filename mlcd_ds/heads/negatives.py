"""The two passes over an image's negatives: logits are formed a block at a time, used, and formed again when needed.

Pass 1 gives each image's sum and the direction of its gradient, as flash attention gives its output with keys and
values both the centres; pass 2 gives the sampled centres' gradient. Neither keeps a logit. A block is some images by
some classes: on a CPU small enough for its cache, on a GPU large enough to fill it.

G images of all ranks, S sampled classes on this rank, E embedding, P labels an image; g and s: of one block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mlcd_ds.heads.centers import Centers
from mlcd_ds.kernels.matmul import Matmul


@dataclass(frozen=True)
class BlockShape:
    """Most images and classes of a block."""

    images: int
    classes: int


BLOCKS = {"cpu": BlockShape(2048, 512), "cuda": BlockShape(16384, 2048)}


class ExpBlock(Protocol):
    """e^{z - shift} of a block [g, s] in the type that `Matmul` takes, with z = emb . scaled, and 0 at own labels.

    `scaled_sE`: centres of length s. `slots_gP`: own labels as columns of this block (out of range: of other blocks).
    `factors_g`, where given, is multiplied in. Also the sums over s [g] before rounding, where no factors are given.
    """

    def __call__(
        self, emb_gE: Tensor, scaled_sE: Tensor, slots_gP: Tensor, shift: float, factors_g: Tensor | None
    ) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True)
class TorchExpBlock:
    """The block in plain torch operations, anywhere.

    A logit above `filtered_above` that is no own label's becomes 0: it counts as e^0 in the sums and has no gradient.
    """

    matmul: Matmul
    filtered_above: float | None = None

    def __call__(
        self, emb_gE: Tensor, scaled_sE: Tensor, slots_gP: Tensor, shift: float, factors_g: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        logits_gs = self.matmul(emb_gE, scaled_sE.T)
        is_filtered_gs = None if self.filtered_above is None else logits_gs > self.filtered_above
        exp_gs = logits_gs.sub_(shift).exp_()
        if is_filtered_gs is not None:
            exp_gs.masked_fill_(is_filtered_gs, math.exp(-shift))
        # Labels of other blocks multiply column 0 by 1: selecting those of this block would make the host wait.
        is_here_gP = (slots_gP >= 0) & (slots_gP < len(scaled_sE))
        keep_gP = (~is_here_gP).to(exp_gs.dtype)
        exp_gs.scatter_reduce_(1, slots_gP.where(is_here_gP, 0), keep_gP, "prod")
        sums_g = exp_gs.sum(dim=1) if factors_g is None else None
        if is_filtered_gs is not None:
            exp_gs.masked_fill_(is_filtered_gs, 0.0)
        return self.matmul.cast(exp_gs if factors_g is None else exp_gs.mul_(factors_g[:, None])), sums_g


@dataclass(frozen=True)
class Negatives:
    """The sampled centres, read a block at a time from the head's rows, and what they are compared with."""

    centers: Centers
    rows_S: Tensor
    slots_GP: Tensor  # place in `rows_S` of an image's own label, -1 where it is none
    scale: float
    shift: float
    exp_block: ExpBlock
    matmul: Matmul

    def sums(self, emb_GE: Tensor) -> tuple[Tensor, Tensor]:
        """Pass 1: n = sum_j e^{z_j - shift} [G], and its derivative by the embeddings [G, E]."""
        dtype = torch.promote_types(emb_GE.dtype, torch.float32)
        sums_G = emb_GE.new_zeros(len(emb_GE), dtype=dtype)
        slopes_GE = torch.zeros_like(emb_GE, dtype=dtype)
        for columns, rows_s in self._class_blocks():
            scaled_sE = self.matmul.cast(self.centers.unit_rows(rows_s)[0].mul_(self.scale))
            for images in self._image_blocks(len(emb_GE)):
                slots_gP = self.slots_GP[images] - columns.start
                exp_gs, sums_g = self.exp_block(emb_GE[images], scaled_sE, slots_gP, self.shift, None)
                assert sums_g is not None
                sums_G[images] += sums_g
                self.matmul.add(slopes_GE[images], exp_gs, scaled_sE)
        return sums_G, slopes_GE

    def add_row_gradients(self, emb_GE: Tensor, factors_G: Tensor) -> None:
        """Pass 2: add sum_b factor_b * (derivative of n_b by a centre) to the sampled rows' gradient."""
        for columns, rows_s in self._class_blocks():
            unit_sE, lengths_s1 = self.centers.unit_rows(rows_s)
            scaled_sE, along_sE = self.matmul.cast(unit_sE * self.scale), torch.zeros_like(unit_sE)
            for images in self._image_blocks(len(emb_GE)):
                slots_gP = self.slots_GP[images] - columns.start
                exp_gs, _ = self.exp_block(emb_GE[images], scaled_sE, slots_gP, self.shift, factors_G[images])
                self.matmul.add(along_sE, exp_gs.T, emb_GE[images])
            self.centers.add_gradient(rows_s, along_sE.mul_(self.scale), unit_sE, lengths_s1)

    def _class_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        size = BLOCKS[self.rows_S.device.type].classes
        for first in range(0, len(self.rows_S), size):
            columns = slice(first, min(first + size, len(self.rows_S)))
            yield columns, self.rows_S[columns]

    def _image_blocks(self, num_images: int) -> Iterator[slice]:
        size = BLOCKS[self.rows_S.device.type].images
        return (slice(first, min(first + size, num_images)) for first in range(0, num_images, size))
