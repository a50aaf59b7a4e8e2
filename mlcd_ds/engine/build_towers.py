"""The towers that a recipe describes, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from mlcd_ds.config import Recipe
from mlcd_ds.models.vit import ViT

TOWERS: dict[str, Callable[[Recipe], nn.Module]] = {"image": lambda recipe: ViT(recipe.model)}
"""Each without weights: they hold NaN until `init_weights`."""
