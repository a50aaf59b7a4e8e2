"""Models of ours: of a training run, or a recipe's as it is initialised."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mlcd_ds.config import load_recipe
from mlcd_ds.data.pixels import clip_pixels
from mlcd_ds.encoders.base import Encoder, PairEncoder, TextEncoder
from mlcd_ds.encoders.run_tokenizer import run_tokenizer
from mlcd_ds.engine.weights import Weights, load_backbone, load_text_tower, newest_checkpoint, read_checkpoint
from mlcd_ds.errors import UserError
from mlcd_ds.models.vit import ViT


def untrained(recipe_name: str, size: int | None) -> Encoder:
    """Our backbone of a recipe, as it is initialised."""
    recipe = load_recipe(recipe_name)
    network = ViT(recipe.model)
    network.init_weights(torch.Generator().manual_seed(recipe.train.seed))
    return _backbone(f"recipe:{recipe_name}", network, size)


def training_run(folder: Path, size: int | None, weights: Weights = "last") -> Encoder:
    """The backbone of a run's newest checkpoint, or the average of its weights."""
    name = _name(folder, weights)
    return _backbone(name, load_backbone(newest_checkpoint(folder), weights), size)


def training_pair(folder: Path, weights: Weights = "last") -> PairEncoder:
    """Both towers of a run's newest checkpoint, projected into one space, with the run's tokenizer."""
    checkpoint = newest_checkpoint(folder)
    text = load_text_tower(checkpoint, weights)
    image = load_backbone(checkpoint, weights)
    tokenizer = run_tokenizer(folder, read_checkpoint(checkpoint), text.config)
    name = f"{_name(folder, weights)}, projected"  # not the backbone's features, which have other fingerprints

    def encode(captions: list[str]) -> Tensor:
        tokens_BL = torch.from_numpy(tokenizer.encode(captions, text.config.context)).long()
        return text(tokens_BL.to(text.projection.weight.device))

    pixels = clip_pixels(image.config.image_size)
    return PairEncoder(Encoder(name, pixels, image, image), TextEncoder(name, text, encode))


def _name(folder: Path, weights: Weights) -> str:
    return folder.resolve().name + ("" if weights == "last" else f" ({weights})")


def _backbone(name: str, network: ViT, size: int | None) -> Encoder:
    """Features before the projection, as linear probes and kNN take them."""
    trained = network.config.image_size
    if size not in (None, trained):
        raise UserError(f"{name} takes images of {trained} pixels, not {size}.")
    return Encoder(name, clip_pixels(trained), network, network.forward_features)
