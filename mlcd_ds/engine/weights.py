"""Finding and reading the backbone of a run: what evaluation and export need, without DeepSpeed."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from mlcd_ds.artefacts.files import FileRecord
from mlcd_ds.artefacts.typed import Frozen, first_problem
from mlcd_ds.config import Recipe, parse_recipe
from mlcd_ds.errors import UserError
from mlcd_ds.models.vit import ViT

CONFIG_NAME = "config.yaml"
CHECKPOINTS = "checkpoints"
CHECKPOINT_NAME = "checkpoint.json"
BACKBONE_NAME = "backbone.safetensors"


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
    deepspeed: dict | None = None  # as the engine was given it
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


def load_backbone(checkpoint: Path) -> ViT:
    """The backbone of a checkpoint folder, in fp32 on the CPU."""
    path = checkpoint / BACKBONE_NAME
    recipe = parse_recipe(read_checkpoint(checkpoint).recipe, str(checkpoint / CHECKPOINT_NAME))
    with torch.device("meta"):
        model = ViT(recipe.model)
    try:
        model.load_state_dict(load_file(path), assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read ({error}). Remove {checkpoint} to use an older checkpoint.") from None
    return model.eval()
