"""Filling towers with given weights: those of a Hugging Face folder, or of a tower of nearly the same shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlcd_ds.artefacts.manifest import check_outputs
from mlcd_ds.artefacts.readers import decoding, read_json_object, read_tensors
from mlcd_ds.errors import UserError
from mlcd_ds.models.convert import BIAS, LOG_SCALE, from_text_model, from_vision_model
from mlcd_ds.models.positions import resize_positions
from mlcd_ds.models.text import TextConfig, TextTower
from mlcd_ds.models.vit import ViT, ViTConfig
from mlcd_ds.objectives.pair_objective import Scale

POSITIONS, REGISTERS = "embeddings.position_embedding.weight", "embeddings.register_embedding"
PROJECTION, CLIP_PROJECTION = "projection.weight", "visual_projection.weight"
FIX = "train.init_from takes a run, or a Hugging Face folder such as `mlcd export` writes."


def load_released(folder: Path, model: ViT) -> list[str]:
    """Fill an initialised backbone from a Hugging Face folder (a released CLIP or MLCD model, or `mlcd export`'s).

    The projection is a whole CLIP model's own, or that of projection.safetensors, where it fits. Returns what was done
    besides copying, in words. UserError names the folder and what does not fit.
    """
    released, tensors = _read(folder)
    with decoding(f"train.init_from {folder}", FIX):
        config, state = from_vision_model(tensors, released)
    apart = folder / "projection.safetensors"
    projection = tensors.get(CLIP_PROJECTION)
    if projection is None and apart.exists():
        projection = read_tensors(apart, FIX).get(PROJECTION)
    if projection is not None:
        state[PROJECTION] = projection
    return fill_image(model, config, state, folder)


def has_text_tower(folder: Path) -> bool:
    """Whether a Hugging Face folder holds a whole CLIP model."""
    return read_json_object(folder / "config.json", FIX).get("model_type") == "clip"


def load_released_text(folder: Path, tower: TextTower) -> list[str]:
    """Fill a text tower from the folder of a whole CLIP model; returns what was done besides copying, in words."""
    released, tensors = _read(folder)
    with decoding(f"train.init_from {folder}", FIX):
        config, state = from_text_model(tensors, released)
    return fill_text(tower, config, state, folder)


@torch.no_grad()
def load_released_scale(folder: Path, scale: Scale) -> bool:
    """Take the factor on cosines (and SigLIP's summand) from the folder of a whole CLIP model. False, with nothing
    done, where it was trained by the other loss: CLIP's factor means another thing to SigLIP."""
    released, tensors = _read(folder)
    if (BIAS in released) != (scale.bias is not None):
        return False
    with decoding(f"train.init_from {folder}: {LOG_SCALE} and {BIAS}", FIX):
        scale.log_scale.fill_(float(tensors[LOG_SCALE]))
        if scale.bias is not None:
            scale.bias.fill_(float(released[BIAS]))
    return True


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and all weights."""
    check_outputs(folder)
    return read_json_object(folder / "config.json", FIX), read_tensors(folder / "model.safetensors", FIX)


def fill_image(model: ViT, config: ViTConfig, state: dict[str, Tensor], folder: Path) -> list[str]:
    """Copy a state of the shape `config` into a model whose shape differs at most in resolution and embedding.

    Learned positions are resized where the resolution differs; registers may be added. Where the state has no
    projection and the embedding is as wide as the features, it is the features.
    """
    check_shape(config, model.config, folder)
    notes = []
    if PROJECTION not in state and model.config.embed_dim == model.config.width:
        state[PROJECTION] = torch.eye(model.config.width)
        notes.append("the projection starts as the identity")
    if (positions := state.get(POSITIONS)) is not None and len(positions) != model.config.num_patches + 1:
        state[POSITIONS] = resize_positions(positions, model.config.num_patches)
        notes.append(f"positions resized from {config.image_size} to {model.config.image_size} px")
    target = model.state_dict()
    for name, what in ((REGISTERS, "the registers start"), (PROJECTION, "the projection starts")):
        if name in state and (name not in target or state[name].shape != target[name].shape):
            del state[name]
        if name in target and name not in state:
            notes.append(f"{what} at random")
    model.load_state_dict(state, strict=False)
    return notes


def fill_text(tower: TextTower, config: TextConfig, state: dict[str, Tensor], folder: Path) -> list[str]:
    """Copy a state of the shape `config` into a text tower of the same, whose context may be shorter."""
    check_text_shape(config, tower.config, folder)
    state[POSITIONS] = state[POSITIONS][: tower.config.context]
    tower.load_state_dict(state)
    is_same = config.context == tower.config.context
    return [] if is_same else [f"texts of {tower.config.context} tokens instead of {config.context}"]


def check_shape(config: ViTConfig, model: ViTConfig, folder: Path) -> None:
    """Raise UserError naming a key in which a given backbone differs from the recipe's; `fill_image` adapts some."""
    adapted = {"image_size", "embed_dim"} if config.num_registers else {"image_size", "embed_dim", "num_registers"}
    for key, value in model.model_dump(exclude=adapted).items():
        if getattr(config, key) != value:
            raise UserError(f"train.init_from {folder} has {key} {getattr(config, key)}, model.{key} is {value}.")


def check_text_shape(config: TextConfig, text: TextConfig, folder: Path) -> None:
    """Raise UserError naming a key in which a given text tower differs from the recipe's; its context may be longer."""
    for key, value in text.model_dump().items():
        given = getattr(config, key)
        if given != value and not (key == "context" and given > value):
            raise UserError(
                f"train.init_from {folder}: its text tower has {key} {given}, text.{key} is {value}. To train another "
                "text tower, start from the image tower alone: the folder of a CLIPVisionModel (`mlcd export "
                "--towers image`)."
            )
