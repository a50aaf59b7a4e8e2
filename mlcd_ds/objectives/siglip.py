"""SigLIP's loss (arXiv 2303.15343, algorithm 1): each pair of an image and a text is judged by itself.

    L = 1/G sum_ij log(1 + e^{-y_ij l_ij}),   l_ij = z_ij + bias,   y_ij = 1 for an image's own text, else -1

with z_ij = s e_i . t_j (pairs.py). Its slopes dL/dl_ij = (sigmoid(l_ij) - [i = j]) / G need no other pair, so one pass
over the blocks gives loss and gradients.

B images and texts on this rank, G of all ranks, E embedding; b and g: of one block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mlcd_ds.objectives.base import Given
from mlcd_ds.objectives.pair_objective import PairConfig, PairObjective, Scale
from mlcd_ds.objectives.pairs import Pairs
from mlcd_ds.recipes.sections import Sections


class SiglipConfig(PairConfig):
    """The paper's constants."""

    name: Literal["siglip"] = "siglip"
    first_scale: float = Field(10.0, ge=1, le=100, description="the factor on cosines at the start (paper: 10)")
    first_bias: float = Field(-10.0, ge=-100, le=100, description="the summand at the start (paper: -10)")


class Siglip(PairObjective):
    """SigLIP's loss with learned scale and bias."""

    config_type = SiglipConfig
    num_products = 3

    @classmethod
    def engine_module(cls, recipe: Sections) -> nn.Module:
        config = recipe.objective
        assert isinstance(config, SiglipConfig)
        return Scale(config.first_scale, (1.0, config.max_scale), config.first_bias)

    @torch.no_grad()
    def __call__(self, outputs: Mapping[str, Tensor], fields: Mapping[str, Tensor], weight: float = 1.0) -> Given:
        """Collectives: those of `pairs`; an all-reduce of the loss's two parts."""
        bias = outputs["bias"].detach()
        parts, gradients = siglip_loss(self.pairs(outputs, outputs["scale"].detach()), bias)
        self._measures["logit_bias"] = bias
        return Given(parts.sum(), {"other_pairs": parts[0], "own_pairs": parts[1]}, gradients)


def siglip_loss(pairs: Pairs, bias: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of other and of own pairs [2], over the whole batch, and the gradients (`Pairs.gradients`, `bias`)."""
    with pairs.matmul.active():
        share = 1 / pairs.num_pairs
        others, own, slope = (bias.new_zeros(()) for _ in range(3))
        for images, texts, logits_bg in pairs.blocks():
            logits_bg.add_(bias)
            entries = pairs.own_pairs(images, texts, logits_bg)[1]
            own += F.softplus(-entries, threshold=80).sum()
            entries_of_others = F.softplus(logits_bg, threshold=80)
            pairs.own_pairs(images, texts, entries_of_others)[1].zero_()
            others += entries_of_others.sum()
            slopes_bg = logits_bg.sigmoid_().mul_(share)
            pairs.add_slopes(images, texts, slopes_bg, own_slope=-share)
            slope += slopes_bg.sum()
    parts = torch.stack([others, own]) * share
    return pairs.group.all_reduce_sum(parts), pairs.gradients() | {"bias": slope}
