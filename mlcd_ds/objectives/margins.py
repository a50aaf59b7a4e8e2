"""Margins on the cosine of a positive: the value that the scale multiplies is harder to raise than the cosine."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

MarginForm = Literal["cosface", "arcface", "none"]


def with_margin(cosine: Tensor, margin: float, form: MarginForm) -> Tensor:
    """The cosine after the margin, with its true gradient. Any shape.

    cosface (Wang et al. 2018): cos(t) - m. arcface (Deng et al. 2019): cos(t + m) up to t = pi - m, and from there on
    a line of slope one that meets it, so that the result falls as the angle grows. none: unchanged.
    """
    if form == "none":
        return cosine
    if form == "cosface":
        return cosine - margin
    # 1 - cos^2 is 0 at |cos| = 1, where the root's slope is infinite; the floor keeps the gradient finite.
    sine = (1 - cosine * cosine).clamp_min(1e-9).sqrt()
    turned = cosine * math.cos(margin) - sine * math.sin(margin)
    return torch.where(cosine > -math.cos(margin), turned, cosine - (1 - math.cos(margin)))


def least_cosine(margin: float, form: MarginForm) -> float:
    """The smallest value `with_margin` takes: at cos = -1."""
    return {"none": -1.0, "cosface": -1.0 - margin, "arcface": -2.0 + math.cos(margin)}[form]
