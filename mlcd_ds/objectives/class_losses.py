"""Losses over class centres, each as a function of two things that ranks can share by one small all-reduce: the
log-sum of an image's negatives, and the cosines of its labels.

    n = log sum_{j in negatives} e^{s cos_j},   z_i = s * margin(cos_i) for the labels i

    mlcd      log(1 + e^n) + log(1 + sum_i e^{-z_i})        arXiv 2407.17331, Eq. 4-5
    mlc       log(1 + e^n * sum_i e^{-z_i})                 the same paper's ablation, its Eq. 3
    unicom    log(1 + e^{n - z_1})                          arXiv 2304.05884: a softmax over the label and the negatives
    averaged_softmax   mean_i log(1 + e^{n - z_i})          one softmax a label, averaged; for comparison only

An image's own labels are never its negatives, in each of them. Only with `separate_samples` are they: each label of an
averaged_softmax then has an n of its own, over all other classes of a sample of its own.

G images of all ranks, P labels an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from mlcd_ds.objectives.margins import MarginForm, with_margin
from mlcd_ds.recipes.sections import ObjectiveConfig

NOTHING = -1e4  # stands for log(0) where a gradient must stay finite: e^-10000 is 0 in any precision


class ClassLossConfig(ObjectiveConfig):
    """Scale and margin form are not published for MLCD; the defaults are those that the same group states for RICE."""

    name: Literal["mlcd", "mlc", "unicom", "averaged_softmax"] = Field("mlcd", description="the loss")
    scale: float = Field(64.0, gt=0, le=75, description="s, the factor on cosines; above 75 its range leaves fp32")
    margin: float = Field(0.3, ge=0, lt=1, description="m, taken off the labels' cosines (paper: 0.3)")
    margin_form: MarginForm = Field("cosface", description="cosface: cos - m; arcface: cos(angle + m); none")
    num_labels: int | None = Field(None, ge=1, description="l, the nearest labels used; null: all there are (paper: 8)")
    feature_rate: float = Field(
        1.0, gt=0, le=1, description="part of the embedding's dimensions in the cosines, redrawn each step (UNICOM)"
    )
    drawn_labels: int | None = Field(
        None, ge=1, description="so many of an image's num_labels are drawn at random each time; null: all"
    )
    similarity_filter: float | None = Field(
        None, ge=0, lt=1, description="logits of non-labels whose cosine is above it become 0; null: none"
    )
    separate_samples: bool = Field(
        False, description="of averaged_softmax: each label has a sample of classes of its own, without it"
    )

    @model_validator(mode="after")
    def _check(self) -> ClassLossConfig:
        if self.name == "unicom" and self.num_labels not in (None, 1):
            raise ValueError(f"unicom takes one label an image, num_labels is {self.num_labels}: leave it out")
        if self.name == "unicom" and self.drawn_labels is not None:
            raise ValueError(f"unicom takes the nearest label, drawn_labels is {self.drawn_labels}: leave it out")
        if self.drawn_labels and self.num_labels and self.drawn_labels > self.num_labels:
            raise ValueError(
                f"drawn_labels {self.drawn_labels} is more than num_labels {self.num_labels}, of which they are drawn: "
                "lower it, or raise num_labels"
            )
        if self.separate_samples and self.name != "averaged_softmax":
            raise ValueError(
                f"separate_samples is for name averaged_softmax, which has a softmax for each label; name is "
                f"{self.name}: set separate_samples=false, or name=averaged_softmax"
            )
        return self


@dataclass(frozen=True)
class ClassLoss:
    """Values and slopes of one of the losses, from what all ranks know."""

    config: ClassLossConfig

    @property
    def scale(self) -> float:
        """s, the factor on cosines."""
        return self.config.scale

    @property
    def feature_rate(self) -> float:
        """Part of the embedding's dimensions that a step uses."""
        return self.config.feature_rate

    @property
    def filtered_above(self) -> float | None:
        """Logits of non-labels above it become 0; None: none does."""
        return None if self.config.similarity_filter is None else self.scale * self.config.similarity_filter

    @property
    def shift(self) -> float:
        """Taken off the negatives' logits before they are exponentiated.

        They lie in [-s, s], so a constant can replace the running maximum of a softmax, and ranks need not agree on
        one. Ten million times e^66, and a gradient that has s as a factor besides, still are numbers in fp32; and up to
        the largest s that is allowed, so is the smallest summand.
        """
        return max(0.0, self.config.scale - 66.0)

    @property
    def num_labels(self) -> int | None:
        return 1 if self.config.name == "unicom" else self.config.num_labels

    def sampled_apart(self, labels_GP: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Labels [G, P], -1 for none, split into those with a sample of classes in common, each [G, p]; and beside them
        their share in an image's loss [G], None for all of it. With separate samples: one over the image's labels."""
        if not self.config.separate_samples:
            return [(labels_GP, None)]
        shares_G = 1 / (labels_GP >= 0).sum(dim=1).clamp_min(1)
        return [(labels_G1, shares_G) for labels_G1 in labels_GP.split(1, dim=1)]

    def parts(self, negatives_G: Tensor, cosines_GP: Tensor, is_label_GP: Tensor) -> dict[str, Tensor]:
        """The loss [G] as parts that add up to it. `negatives_G` is n, -inf where an image has no negative."""
        logits_GP = self.config.scale * with_margin(cosines_GP, self.config.margin, self.config.margin_form)
        if self.config.name == "averaged_softmax":
            losses_GP = F.softplus(negatives_G[:, None] - logits_GP, threshold=80) * is_label_GP
            return {"softmax": losses_GP.sum(dim=1) / is_label_GP.sum(dim=1).clamp_min(1)}
        positives_G = torch.logsumexp((-logits_GP).masked_fill(~is_label_GP, NOTHING), dim=1)
        if self.config.name == "mlcd":
            return {
                "negatives": F.softplus(negatives_G, threshold=80),
                "positives": F.softplus(positives_G, threshold=80),
            }
        return {"joint": F.softplus(negatives_G + positives_G, threshold=80)}

    def slopes(
        self, negatives_G: Tensor, cosines_GP: Tensor, is_label_GP: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The parts [G], and the loss's derivatives by n [G] and by the labels' cosines [G, P]. No collective."""
        with torch.enable_grad():
            leaves = negatives_G.detach().requires_grad_(), cosines_GP.detach().requires_grad_()
            parts = self.parts(*leaves, is_label_GP)
            total = torch.stack([part.sum() for part in parts.values()]).sum()
            slope_G, slope_GP = torch.autograd.grad(total, leaves)
        return {name: part.detach() for name, part in parts.items()}, slope_G, slope_GP
