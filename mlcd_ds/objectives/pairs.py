"""Logits of images with texts, a block at a time: what CLIP's and SigLIP's losses share. No block is ever kept.

A rank forms the logits of its own images with the texts of all ranks, z_ij = s e_i . t_j, which serve both directions:
sums over its columns and its share of sums over its rows. So only the texts travel, and back only their gradient. The
gradients follow from the slopes g_ij = dL/dz_ij of each block as it passes:

    dL/de_i = s sum_j g_ij t_j,   dL/dt_j = s sum_i g_ij e_i
    s dL/ds = sum_ij g_ij z_ij = sum_i e_i . dL/de_i = sum_j t_j . dL/dt_j

B images and texts on this rank, G of all ranks, E embedding; b and g: of one block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.kernels.matmul import Matmul

BLOCKS = {"cpu": (1024, 1024), "cuda": (16384, 2048)}  # most images and texts of a block


class Pairs:
    """One batch. Collectives: an all-gather [G, E]; in `gradients` a reduce-scatter [G, E], where texts want any."""

    def __init__(
        self,
        image_BE: Tensor,
        text_BE: Tensor,
        scale: Tensor,
        group: Group,
        matmul: Matmul,
        wanted: Collection[str] = ("image", "text"),
    ) -> None:
        """Embeddings of unit length; `scale` a number on the device; `wanted`: what gradients are asked for, at least
        one."""
        self._wanted = wanted
        self.image_BE, self.scale, self.group, self.matmul = image_BE, scale, group, matmul
        self._scaled_BE = matmul.cast(image_BE * scale)
        self._text_GE = group.all_gather(matmul.cast(text_BE))
        begin = group.rank * len(image_BE)
        self.own = slice(begin, begin + len(image_BE))
        self._image_grad_BE = torch.zeros_like(image_BE)
        self._text_grad_GE = torch.zeros_like(self._text_GE, dtype=image_BE.dtype)

    @property
    def num_pairs(self) -> int:
        """G."""
        return len(self._text_GE)

    def own_logits(self) -> Tensor:
        """z_ii [B]."""
        dtype = self.image_BE.dtype
        return (self._scaled_BE.to(dtype) * self._text_GE[self.own].to(dtype)).sum(dim=1)

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Images, texts, and their logits [b, g], which the caller may overwrite."""
        most_images, most_texts = BLOCKS[self.image_BE.device.type]
        for first in range(0, self.num_pairs, most_texts):
            texts = slice(first, min(first + most_texts, self.num_pairs))
            for begin in range(0, len(self.image_BE), most_images):
                images = slice(begin, min(begin + most_images, len(self.image_BE)))
                yield images, texts, self.matmul(self._scaled_BE[images], self._text_GE[texts].T)

    def add_slopes(self, images: slice, texts: slice, slopes_bg: Tensor) -> None:
        """Take in the slopes of a block."""
        slopes_bg = self.matmul.cast(slopes_bg)
        if "image" in self._wanted:
            self.matmul.add(self._image_grad_BE[images], slopes_bg, self._text_GE[texts])
        if "text" in self._wanted:
            self.matmul.add(self._text_grad_GE[texts], slopes_bg.T, self._scaled_BE[images])

    def add_own_slopes(self, slope: float) -> None:
        """The same slope for each pair of an image and its own text."""
        dtype = self.image_BE.dtype
        self._image_grad_BE.add_(self._text_GE[self.own].to(dtype), alpha=slope)
        self._text_grad_GE[self.own].add_(self._scaled_BE.to(dtype), alpha=slope)

    def gradients(self) -> dict[str, Tensor]:
        """Of `image` and `text` [B, E], where they are wanted, complete; of `scale` this rank's share."""
        # The texts' sums have the factor s already, by the scaled images.
        found = {}
        if "image" in self._wanted:
            found["scale"] = (self.image_BE * self._image_grad_BE).sum()
            found["image"] = self._image_grad_BE * self.scale
        else:
            found["scale"] = (self._text_GE.to(self.image_BE.dtype) * self._text_grad_GE).sum() / self.scale
        if "text" in self._wanted:
            found["text"] = self.group.reduce_scatter_sum(self._text_grad_GE)
        return found
