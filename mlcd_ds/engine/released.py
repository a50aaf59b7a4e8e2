"""Filling an image tower with given weights: those of a Hugging Face folder, or of a tower of nearly the same shape."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mlcd_ds.artefacts.manifest import check_outputs
from mlcd_ds.artefacts.readers import decoding, read_json_object, read_tensors
from mlcd_ds.errors import UserError
from mlcd_ds.models.convert import from_vision_model
from mlcd_ds.models.positions import resize_positions
from mlcd_ds.models.vit import ViT, ViTConfig

POSITIONS, REGISTERS = "embeddings.position_embedding.weight", "embeddings.register_embedding"
PROJECTION = "projection.weight"


def load_released(folder: Path, model: ViT) -> list[str]:
    """Fill an initialised backbone from a Hugging Face folder (a released CLIP or MLCD model, or `mlcd export`'s).

    The projection is taken from projection.safetensors where that fits, else left as it was initialised. Returns what
    was done besides copying, in words. UserError names the folder and what does not fit.
    """
    fix = "train.init_from takes a run, or a Hugging Face folder such as `mlcd export` writes."
    check_outputs(folder)
    released = read_json_object(folder / "config.json", fix)
    tensors = read_tensors(folder / "model.safetensors", fix)
    with decoding(f"train.init_from {folder}", fix):
        config, state = from_vision_model(tensors, released)
    projection = folder / "projection.safetensors"
    if projection.exists() and (weight := read_tensors(projection, fix).get(PROJECTION)) is not None:
        state[PROJECTION] = weight
    return fill_image(model, config, state, folder)


def fill_image(model: ViT, config: ViTConfig, state: dict[str, Tensor], folder: Path) -> list[str]:
    """Copy a state of the shape `config` into a model whose shape differs at most in resolution and embedding.

    Learned positions are resized where the resolution differs; registers may be added.
    """
    check_shape(config, model.config, folder)
    notes = []
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


def check_shape(config: ViTConfig, model: ViTConfig, folder: Path) -> None:
    """Raise UserError naming a key in which a given backbone differs from the recipe's; `fill_image` adapts some."""
    adapted = {"image_size", "embed_dim"} if config.num_registers else {"image_size", "embed_dim", "num_registers"}
    for key, value in model.model_dump(exclude=adapted).items():
        if getattr(config, key) != value:
            raise UserError(f"train.init_from {folder} has {key} {getattr(config, key)}, model.{key} is {value}.")
