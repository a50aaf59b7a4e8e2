"""Finding and reading the backbone of a run: what evaluation and export need, without DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
import yaml
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from mlcd_ds.artefacts.files import FileRecord
from mlcd_ds.artefacts.typed import Frozen, first_problem
from mlcd_ds.config import Recipe, parse_recipe
from mlcd_ds.errors import UserError
from mlcd_ds.models.convert import from_vision_model
from mlcd_ds.models.positions import resize_positions
from mlcd_ds.models.vit import ViT

CONFIG_NAME = "config.yaml"
CHECKPOINTS = "checkpoints"
CHECKPOINT_NAME = "checkpoint.json"
BACKBONE_NAME, AVERAGE_NAME = "backbone.safetensors", "ema.safetensors"
Weights = Literal["last", "ema"]
POSITIONS = "embeddings.position_embedding.weight"


class CheckpointManifest(Frozen):
    """Written last into a checkpoint's folder: its presence marks the checkpoint complete."""

    step: int
    num_ranks: int
    zero_stage: int
    tensor_parallel: int = 1
    num_classes: int
    num_updates: int | None = None  # none in those of earlier versions, which hold no whole moments
    loss_scale: dict[str, float] = Field(default_factory=dict)
    inputs: dict[str, str]
    recipe: dict
    files: dict[str, FileRecord]
    versions: dict[str, str]
    git_commit: str | None


def read_checkpoint(folder: Path) -> CheckpointManifest:
    """The manifest of a checkpoint folder."""
    path = folder / CHECKPOINT_NAME
    try:
        return CheckpointManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}. Remove {folder} to go on from an older checkpoint.") from None


def checkpoint_folders(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(path.parent for path in (run / CHECKPOINTS).glob(f"step_*/{CHECKPOINT_NAME}"))


def read_run_recipe(run: Path) -> Recipe:
    """The resolved recipe in a run's folder."""
    path = run / CONFIG_NAME
    if not path.exists():
        raise UserError(f"{path} is not there: {run} is not the folder of a training run.")
    return parse_recipe(yaml.safe_load(path.read_text()), str(path))


def newest_checkpoint(run: Path) -> Path:
    """Folder of a run's newest whole checkpoint."""
    folders = checkpoint_folders(run)
    if not folders:
        raise UserError(f"{run} has no whole checkpoint yet: train at least train.checkpoint_every steps.")
    return folders[-1]


def backbone_path(checkpoint: Path, weights: Weights) -> Path:
    """The file of a checkpoint's weights, or of their moving average. UserError where the run keeps none."""
    path = checkpoint / (AVERAGE_NAME if weights == "ema" else BACKBONE_NAME)
    if weights == "ema" and path.name not in read_checkpoint(checkpoint).files:
        raise UserError(f"{checkpoint} holds no {path.name}: the run has train.ema_decay null. Take --weights last.")
    return path


def load_backbone(checkpoint: Path, weights: Weights = "last") -> ViT:
    """The backbone of a checkpoint folder, in fp32 on the CPU; "ema": the moving average of its weights."""
    path = backbone_path(checkpoint, weights)
    recipe = parse_recipe(read_checkpoint(checkpoint).recipe, str(checkpoint / CHECKPOINT_NAME))
    with torch.device("meta"):
        model = ViT(recipe.model)
    try:
        model.load_state_dict(load_file(path), assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read ({error}). Remove {checkpoint} to use an older checkpoint.") from None
    return model.eval()


def load_released(folder: Path, model: ViT) -> list[str]:
    """Fill an initialised backbone from a Hugging Face folder (a released CLIP or MLCD model, or `mlcd export`'s).

    Learned positions are resized where the resolution differs. The projection is taken from projection.safetensors
    where that fits, else left as it was initialised. Returns what was done besides copying, in words. UserError names
    the folder and what does not fit.
    """
    notes = []
    try:
        released = json.loads((folder / "config.json").read_text())
        config, state = from_vision_model(load_file(folder / "model.safetensors"), released)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"train.init_from {folder} cannot be read: {error}") from None
    own = ("image_size", "embed_dim", "num_registers")
    for key, value in model.config.model_dump(exclude=set(own)).items():
        if getattr(config, key) != value:
            raise UserError(f"train.init_from {folder} has {key} {getattr(config, key)}, model.{key} is {value}.")
    if (positions := state.get(POSITIONS)) is not None and len(positions) != model.config.num_patches + 1:
        state[POSITIONS] = resize_positions(positions, model.config.num_patches)
        notes.append(f"positions resized from {config.image_size} to {model.config.image_size} px")
    target = model.state_dict()
    projection = folder / "projection.safetensors"
    if projection.exists():
        weight = load_file(projection)["projection.weight"]
        if weight.shape == target["projection.weight"].shape:
            state["projection.weight"] = weight
    if model.config.num_registers:
        notes.append("the registers start at random")
    if "projection.weight" not in state:
        notes.append("the projection starts at random")
    model.load_state_dict(state, strict=False)
    return notes
