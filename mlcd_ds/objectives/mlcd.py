"""The MLCD loss (arXiv 2407.17331, Eq. 4-5) as a function of sums that any number of ranks can share.

    L = log(1 + sum_{i in positives} e^{-z_i}) + log(1 + sum_{j in negatives} e^{z_j})
    z_i = s * margin(cos_i),  z_j = s * cos_j

An image's own positives are never its negatives. Cosines are bounded, so a constant shift replaces the running maximum
of a softmax: half the range. A range of at most 140 keeps the summands, the constant 1 and their sums inside fp32.
G images of all ranks, S sampled classes on this rank, K (image, label) pairs on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mlcd_ds.heads.margins import MarginForm, least_cosine, with_margin
from mlcd_ds.manifest import Frozen


class MLCDConfig(Frozen):
    """Scale and margin are not published for MLCD; the defaults are those that the same group states for RICE."""

    name: Literal["mlcd"] = Field("mlcd", description="the objective")
    scale: float = Field(64.0, gt=0, le=140, description="s, the factor on cosines")
    margin: float = Field(0.3, ge=0, lt=1, description="m, taken off the positives' cosines (paper: 0.3)")
    margin_form: MarginForm = Field("cosface", description="cosface: cos - m; arcface: cos(angle + m); none")

    @model_validator(mode="after")
    def _check_range(self) -> MLCDConfig:
        least = -least_cosine(self.margin, self.margin_form)
        if self.scale * least > 140:  # half of it is an exponent: e^70 times millions of classes still fits into fp32
            raise ValueError(
                f"scale {self.scale} with margin {self.margin} ({self.margin_form}) overflows fp32: set scale to at "
                f"most {140 / least:.0f}, or a smaller margin"
            )
        return self


@dataclass(frozen=True)
class MLCDLoss:
    """The loss's two sums, over one rank's classes, and what follows from their totals."""

    config: MLCDConfig

    @property
    def negative_shift(self) -> float:
        """Logits of negatives lie in [-s, s]; they are exponentiated relative to this."""
        return self.config.scale / 2

    @property
    def positive_shift(self) -> float:
        """Negated logits of positives are at most -s * least cosine; they are exponentiated relative to half of it."""
        return -self.config.scale * least_cosine(self.config.margin, self.config.margin_form) / 2

    def negative_sums(self, cosines_GS: Tensor) -> Tensor:
        """[G]: sum over S of e^{z - shift}. A cosine of -inf marks what is not a negative."""
        return torch.exp(self.config.scale * cosines_GS - self.negative_shift).sum(dim=1)

    def positive_sums(self, cosines_K: Tensor, images_K: Tensor, num_images: int) -> Tensor:
        """[G]: sum of e^{-z - shift} over the pairs of each image; `images_K` names the pairs' images."""
        z_K = self.config.scale * with_margin(cosines_K, self.config.margin, self.config.margin_form)
        return cosines_K.new_zeros(num_images).index_add(0, images_K, torch.exp(-z_K - self.positive_shift))

    def terms(self, negative_G: Tensor, positive_G: Tensor) -> tuple[Tensor, Tensor]:
        """Both terms of the loss [G], from the sums over all ranks."""
        return (
            torch.log(negative_G + self._one(self.negative_shift)) + self.negative_shift,
            torch.log(positive_G + self._one(self.positive_shift)) + self.positive_shift,
        )

    def slopes(self, negative_G: Tensor, positive_G: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives [G] of the two terms with respect to their sums."""
        return 1 / (negative_G + self._one(self.negative_shift)), 1 / (positive_G + self._one(self.positive_shift))

    @staticmethod
    def _one(shift: float) -> float:
        """The constant 1 inside the logarithm, relative to the shift."""
        return float(torch.exp(torch.tensor(-shift, dtype=torch.float64)))
