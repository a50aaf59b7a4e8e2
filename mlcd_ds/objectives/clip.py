"""CLIP's loss (arXiv 2103.00020, figure 3): each image finds its text among those of the global batch, and the reverse.

    L = (L_I + L_T) / 2,   L_I = 1/G sum_i [log sum_j e^{z_ij} - z_ii],   L_T = 1/G sum_j [log sum_i e^{z_ij} - z_jj]

with z_ij = s e_i . t_j (pairs.py). From a_i = log sum_j e^{z_ij} and b_j = log sum_i e^{z_ij} follow the slopes

    dL/dz_ij = (e^{z_ij - a_i} + e^{z_ij - b_j}) / 2G  -  [i = j] / G

Two passes over blocks of logits: the first gives a and b, the second forms them again for the gradients.

B images and texts on this rank, G of all ranks, E embedding; b and g: of one block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.objectives.base import Given
from mlcd_ds.objectives.pair_objective import PairConfig, PairObjective, Scale
from mlcd_ds.objectives.pairs import Pairs
from mlcd_ds.recipes.sections import Sections


class ClipConfig(PairConfig):
    """CLIP's constants."""

    name: Literal["clip"] = "clip"
    temperature: float = Field(0.07, gt=0, le=1, description="1 / the factor on cosines, at the start (paper: 0.07)")


class Clip(PairObjective):
    """CLIP's loss with a learned scale, clamped to [1, max_scale]."""

    config_type = ClipConfig
    num_products = 4

    @classmethod
    def engine_module(cls, recipe: Sections) -> nn.Module:
        assert isinstance(recipe.objective, ClipConfig)
        return Scale(1 / recipe.objective.temperature, (1.0, recipe.objective.max_scale))

    @torch.no_grad()
    def __call__(self, outputs: Mapping[str, Tensor], fields: Mapping[str, Tensor], weight: float = 1.0) -> Given:
        """Collectives: those of `pairs`; two all-reduces of [G]; one of the loss's two parts."""
        parts, gradients = clip_loss(self.pairs(outputs, outputs["scale"].detach()))
        return Given(parts.sum(), {"image": parts[0], "text": parts[1]}, gradients)


def clip_loss(pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
    """The halves of the loss [2], over the whole batch, and the gradients (`Pairs.gradients`)."""
    with pairs.matmul.active():
        rows, columns, own_B = _sums(pairs)
        half = 0.5 / pairs.num_pairs
        for images, texts, logits_bg in pairs.blocks():
            by_image_bg = rows.share(images, logits_bg, dim=1)
            slopes_bg = by_image_bg.add_(columns.share(texts, logits_bg, dim=0)).mul_(half)
            pairs.add_slopes(images, texts, slopes_bg, own_slope=-2 * half)
    parts = torch.stack([rows.excess(slice(None), own_B).sum(), columns.excess(pairs.own, own_B).sum()]) * half
    return pairs.group.all_reduce_sum(parts), pairs.gradients()


@dataclass(frozen=True)
class LogSums:
    """log sum_j e^{z_j} of n rows of logits, as the largest logit and the sum of e^{z_j - largest}.

    Apart, because near the end of training an own logit is the largest and the rest of the sum tiny: then both the loss
    and the own slope are small differences, which one rounded number would lose.
    """

    largest_n: Tensor
    sums_n: Tensor

    @classmethod
    def empty(cls, count: int, like: Tensor) -> LogSums:
        """Of no logits."""
        return cls(like.new_full((count,), -torch.inf), like.new_zeros(count))

    def add(self, rows: slice, logits_bg: Tensor, dim: int) -> None:
        """Take in a block of logits of some rows; the others lie along `dim`."""
        before = self.largest_n[rows]
        after = torch.maximum(before, logits_bg.amax(dim=dim))
        added = (logits_bg - after.unsqueeze(dim)).exp_().sum(dim=dim)
        self.sums_n[rows] = self.sums_n[rows] * (before - after).exp_() + added
        self.largest_n[rows] = after

    def of_all(self, group: Group) -> LogSums:
        """Of the logits of all ranks. Two all-reduces of [n]."""
        largest_n = group.all_reduce_max(self.largest_n.clone())
        return LogSums(largest_n, group.all_reduce_sum(self.sums_n * (self.largest_n - largest_n).exp_()))

    def share(self, rows: slice, logits_bg: Tensor, dim: int) -> Tensor:
        """e^z over its row's sum, of a block."""
        exp_bg = (logits_bg - self.largest_n[rows].unsqueeze(dim)).exp_()
        return exp_bg.div_(self.sums_n[rows].unsqueeze(dim))

    def excess(self, rows: slice, logits_n: Tensor) -> Tensor:
        """By how much the log-sum is above one logit of each row."""
        return self.largest_n[rows] - logits_n + self.sums_n[rows].log()


def _sums(pairs: Pairs) -> tuple[LogSums, LogSums, Tensor]:
    """Over the texts, of this rank's images; over the images, of all texts; and z_ii [B]."""
    rows, columns = (LogSums.empty(count, pairs.image_BE) for count in (len(pairs.image_BE), pairs.num_pairs))
    own_B = torch.zeros_like(rows.sums_n)
    for images, texts, logits_bg in pairs.blocks():
        rows.add(images, logits_bg, dim=1)
        columns.add(texts, logits_bg, dim=0)
        which, entries = pairs.own_pairs(images, texts, logits_bg)
        own_B[which] = entries
    return rows, columns.of_all(pairs.group), own_B
