"""Filling towers with given weights: those of a folder of transformers or open_clip, or of a tower of nearly the same
shape."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlcd_ds.artefacts.manifest import check_outputs
from mlcd_ds.artefacts.readers import decoding, is_there, read_json_object, read_tensors
from mlcd_ds.errors import UserError
from mlcd_ds.models.convert import BIAS, LOG_SCALE, from_text_model, from_vision_model
from mlcd_ds.models.open_clip import CONFIG_NAME as OPEN_CLIP_CONFIG
from mlcd_ds.models.open_clip import NOTE, from_open_clip, towers_of_open_clip
from mlcd_ds.models.open_clip import WEIGHTS_NAME as OPEN_CLIP_WEIGHTS
from mlcd_ds.models.positions import resize_positions
from mlcd_ds.models.text import TextConfig, TextTower
from mlcd_ds.models.tower import Tower
from mlcd_ds.models.vit import ViT, ViTConfig
from mlcd_ds.objectives.pair_objective import Scale

POSITIONS, REGISTERS = "embeddings.position_embedding.weight", "embeddings.register_embedding"
PROJECTION, CLIP_PROJECTION = "projection.weight", "visual_projection.weight"
FIX = "train.init_from takes a run, or a folder for transformers or open_clip such as `mlcd export` writes."


@dataclass(frozen=True)
class Released:
    """A model in a folder: config and tensors, as they were read."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def image(self) -> tuple[ViTConfig, dict[str, Tensor]]:
        """Shape and state of the image tower; the state may lack its projection."""
        raise NotImplementedError

    def has_text(self) -> bool:
        """Whether there is a text tower."""
        raise NotImplementedError

    def text(self) -> tuple[TextConfig, dict[str, Tensor]]:
        """Shape and state of the text tower."""
        raise NotImplementedError

    def bias(self) -> float | None:
        """SigLIP's summand; None in a model of CLIP's loss."""
        raise NotImplementedError

    def fill(self, tower: Tower) -> list[str]:
        """Fill an initialised tower; returns what was done besides copying, in words. UserError names the folder and
        what does not fit."""
        if isinstance(tower, ViT):
            with decoding(f"train.init_from {self.folder}", FIX):
                image, state = self.image()
            return fill_image(tower, image, state, self.folder)
        assert isinstance(tower, TextTower)
        if not self.has_text():
            raise UserError(f"train.init_from {self.folder} holds no text tower. {FIX}")
        with decoding(f"train.init_from {self.folder}", FIX):
            text, state = self.text()
        return fill_text(tower, text, state, self.folder)

    @torch.no_grad()
    def fill_scale(self, scale: Scale) -> bool:
        """Take the factor on cosines, and SigLIP's summand. False, with nothing done, where the model was trained by
        the other loss: CLIP's factor means another thing to SigLIP."""
        with decoding(f"train.init_from {self.folder}: {LOG_SCALE} and {BIAS}", FIX):
            bias = self.bias()
            if (bias is None) != (scale.bias is None):
                return False
            scale.log_scale.fill_(float(self.tensors[LOG_SCALE]))
            if scale.bias is not None and bias is not None:
                scale.bias.fill_(bias)
        return True


class HuggingFaceModel(Released):
    """A released CLIP or MLCD model, or `mlcd export`'s: config.json, model.safetensors."""

    def image(self) -> tuple[ViTConfig, dict[str, Tensor]]:
        config, state = from_vision_model(self.tensors, self.config)
        apart, projection = self.folder / "projection.safetensors", self.tensors.get(CLIP_PROJECTION)
        if projection is None and apart.exists():
            projection = read_tensors(apart, FIX).get(PROJECTION)
        return config, state if projection is None else {**state, PROJECTION: projection}

    def has_text(self) -> bool:
        return self.config.get("model_type") == "clip"

    def text(self) -> tuple[TextConfig, dict[str, Tensor]]:
        return from_text_model(self.tensors, self.config)

    def bias(self) -> float | None:
        return None if BIAS not in self.config else float(self.config[BIAS])


class OpenClipModel(Released):
    """What open_clip's local-dir: takes, open_clip_config.json and open_clip_model.safetensors."""

    def image(self) -> tuple[ViTConfig, dict[str, Tensor]]:
        config = towers_of_open_clip(self.config["model_cfg"])[0]
        return config, from_open_clip(self.tensors, config)

    def has_text(self) -> bool:
        return self.config.get("note") != NOTE  # or else a placeholder

    def text(self) -> tuple[TextConfig, dict[str, Tensor]]:
        config = towers_of_open_clip(self.config["model_cfg"])[1]
        return config, from_open_clip(self.tensors, config)

    def bias(self) -> float | None:
        return None if BIAS not in self.tensors else float(self.tensors[BIAS])


def read_released(folder: Path) -> Released:
    """What is in a folder of transformers or open_clip."""
    is_open_clip = is_there(folder / OPEN_CLIP_CONFIG, FIX) and not is_there(folder / "config.json", FIX)
    names = (OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS) if is_open_clip else ("config.json", "model.safetensors")
    check_outputs(folder)
    config, tensors = read_json_object(folder / names[0], FIX), read_tensors(folder / names[1], FIX)
    return (OpenClipModel if is_open_clip else HuggingFaceModel)(folder, config, tensors)


def load_released(folder: Path, tower: Tower) -> list[str]:
    """Fill an initialised tower from such a folder; returns what was done besides copying, in words."""
    return read_released(folder).fill(tower)


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
