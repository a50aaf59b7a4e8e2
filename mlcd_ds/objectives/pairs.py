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

BLOCKS = {"cpu": (512, 1024), "cuda": (8192, 2048)}  # most images and texts of a block


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
        self._cast_BE = matmul.cast(image_BE)
        self._text_GE = group.all_gather(matmul.cast(text_BE))
        begin = group.rank * len(image_BE)
        self.own = slice(begin, begin + len(image_BE))
        self._image_grad_BE = torch.zeros_like(image_BE)
        self._text_grad_GE = torch.zeros_like(self._text_GE, dtype=image_BE.dtype)

    @property
    def num_pairs(self) -> int:
        """G."""
        return len(self._text_GE)

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Images, texts, and their logits [b, g], which the caller may overwrite."""
        most_images, most_texts = BLOCKS[self.image_BE.device.type]
        for first in range(0, self.num_pairs, most_texts):
            texts = slice(first, min(first + most_texts, self.num_pairs))
            for begin in range(0, len(self.image_BE), most_images):
                images = slice(begin, min(begin + most_images, len(self.image_BE)))
                logits_bg = self.matmul(self._cast_BE[images], self._text_GE[texts].T)
                yield images, texts, logits_bg.mul_(self.scale)

    def own_pairs(self, images: slice, texts: slice, block_bg: Tensor) -> tuple[slice, Tensor]:
        """Which images meet their own text in a block, and the entries where they do: a view, perhaps empty."""
        begin = max(images.start, texts.start - self.own.start)
        count = max(0, min(images.stop, texts.stop - self.own.start) - begin)
        row, column = begin - images.start, begin + self.own.start - texts.start
        return slice(begin, begin + count), block_bg[row:, column:].diagonal()[:count]

    def add_slopes(self, images: slice, texts: slice, slopes_bg: Tensor, own_slope: float) -> None:
        """Take in the slopes of a block, to which `own_slope` is added where an image meets its own text."""
        # In the block, not after the products: near the end of training the two cancel.
        self.own_pairs(images, texts, slopes_bg)[1].add_(own_slope)
        slopes_bg = self.matmul.cast(slopes_bg)
        if "image" in self._wanted:
            self.matmul.add(self._image_grad_BE[images], slopes_bg, self._text_GE[texts])
        if "text" in self._wanted:
            self.matmul.add(self._text_grad_GE[texts], slopes_bg.T, self._cast_BE[images])

    def gap(self) -> Tensor:
        """Between the modalities: the distance of the means of all images and all texts (arXiv 2203.02053). One
        all-reduce of [E]."""
        image_E = self.group.all_reduce_sum(self.image_BE.sum(dim=0)) / self.num_pairs
        return (image_E - self._text_GE.to(image_E.dtype).mean(dim=0)).norm()

    def gradients(self) -> dict[str, Tensor]:
        """Of `image` and `text` [B, E], where they are wanted, complete; of `scale` this rank's share."""
        found = {}
        if "image" in self._wanted:
            found["scale"] = torch.dot(self.image_BE.flatten(), self._image_grad_BE.flatten())
            found["image"] = self._image_grad_BE.mul_(self.scale)
        else:
            text_GE = self._text_GE.to(self.image_BE.dtype)
            found["scale"] = torch.dot(text_GE.flatten(), self._text_grad_GE.flatten())
        if "text" in self._wanted:
            found["text"] = self.group.reduce_scatter_sum(self._text_grad_GE).mul_(self.scale)
        return found
