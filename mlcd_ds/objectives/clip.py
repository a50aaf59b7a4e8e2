"""CLIP's loss (arXiv 2103.00020, figure 3): each image finds its text among those of the global batch, and the reverse.

    L = (L_I + L_T) / 2,   L_I = 1/G sum_i [log sum_j e^{z_ij} - z_ii],   L_T = 1/G sum_j [log sum_i e^{z_ij} - z_jj]

with z_ij = s e_i . t_j (pairs.py). From a_i = log sum_j e^{z_ij} and b_j = log sum_i e^{z_ij} follow the slopes

    dL/dz_ij = (e^{z_ij - a_i} + e^{z_ij - b_j}) / 2G  -  [i = j] / G

Two passes over blocks of logits: the first gives a and b, the second forms them again for the gradients.

B images and texts on this rank, G of all ranks, E embedding; b and g: of one block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

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
        """Collectives: those of `Pairs`; an all-reduce of [G] in fp64; one of the loss's two parts."""
        scale = outputs["scale"].detach()
        self._measures = {"logit_scale": scale}
        parts, gradients = clip_loss(self.pairs(outputs, scale))
        return Given(parts.sum(), {"image": parts[0], "text": parts[1]}, gradients)


def clip_loss(pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
    """The halves of the loss [2], over the whole batch, and the gradients (`Pairs.gradients`)."""
    with pairs.matmul.active():
        rows_B, columns_G = _log_sums(pairs)
        half = 0.5 / pairs.num_pairs
        for images, texts, logits_bg in pairs.blocks():
            by_image_bg = (logits_bg - rows_B[images, None]).exp_()
            by_text_bg = logits_bg.sub_(columns_G[texts]).exp_()
            pairs.add_slopes(images, texts, by_image_bg.add_(by_text_bg).mul_(half))
        pairs.add_own_slopes(-2 * half)
        own_B = pairs.own_logits()
    parts = torch.stack([(sums_B - own_B).sum() for sums_B in (rows_B, columns_G[pairs.own])]) * half
    return pairs.group.all_reduce_sum(parts), pairs.gradients()


def _log_sums(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """a [B] of this rank's images, b [G] of all texts."""
    dtype = pairs.image_BE.dtype
    rows_B = pairs.image_BE.new_full((len(pairs.image_BE),), -torch.inf)
    columns_G = pairs.image_BE.new_full((pairs.num_pairs,), -torch.inf)
    for images, texts, logits_bg in pairs.blocks():
        rows_B[images] = torch.logaddexp(rows_B[images], logits_bg.logsumexp(dim=1))
        columns_G[texts] = torch.logaddexp(columns_G[texts], logits_bg.logsumexp(dim=0))
    # No logit is beyond 500, so the sums are within fp64's range: the ranks need not agree on a maximum first.
    sums_G = pairs.group.all_reduce_sum(columns_G.double().exp())
    return rows_B, sums_G.log().to(dtype)
