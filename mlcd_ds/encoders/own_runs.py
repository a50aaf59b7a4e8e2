"""Backbones of ours: of a training run, or a recipe's as it is initialised."""

from __future__ import annotations

from pathlib import Path

import torch

from mlcd_ds.config import load_recipe
from mlcd_ds.data.pixels import clip_pixels
from mlcd_ds.encoders.base import Encoder
from mlcd_ds.engine.weights import load_backbone, newest_checkpoint
from mlcd_ds.errors import UserError
from mlcd_ds.models.vit import ViT


def untrained(recipe_name: str, size: int | None) -> Encoder:
    """Our backbone of a recipe, as it is initialised."""
    recipe = load_recipe(recipe_name)
    network = ViT(recipe.model)
    network.init_weights(torch.Generator().manual_seed(recipe.train.seed))
    return _backbone(f"recipe:{recipe_name}", network, size)


def training_run(folder: Path, size: int | None) -> Encoder:
    """The backbone of a run's newest checkpoint."""
    return _backbone(folder.resolve().name, load_backbone(newest_checkpoint(folder)), size)


def _backbone(name: str, network: ViT, size: int | None) -> Encoder:
    """Features before the projection, as linear probes and kNN take them."""
    trained = network.config.image_size
    if size not in (None, trained):
        raise UserError(f"{name} takes images of {trained} pixels, not {size}.")
    return Encoder(name, clip_pixels(trained), network, network.forward_features)
