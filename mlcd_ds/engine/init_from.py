"""Starting a run from given weights: a run of ours, backbone and objective; or a Hugging Face folder, the backbone
alone.

Only the weights are taken: the optimizer's state, the step and the order of samples are the new run's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mlcd_ds.artefacts.manifest import check_outputs
from mlcd_ds.artefacts.readers import decoding, read_json_object, read_tensors
from mlcd_ds.config import Recipe, parse_recipe
from mlcd_ds.data.fields import TrainingData
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.engine.checkpoint import check_files
from mlcd_ds.engine.weights import (
    CHECKPOINT_NAME,
    CONFIG_NAME,
    CheckpointManifest,
    checkpoint_folders,
    load_backbone,
    newest_checkpoint,
    read_checkpoint,
)
from mlcd_ds.errors import UserError
from mlcd_ds.models.convert import from_vision_model
from mlcd_ds.models.positions import resize_positions
from mlcd_ds.models.vit import ViT, ViTConfig
from mlcd_ds.objectives.base import Objective
from mlcd_ds.objectives.registry import kind_of

POSITIONS, REGISTERS = "embeddings.position_embedding.weight", "embeddings.register_embedding"
PROJECTION = "projection.weight"


@dataclass(frozen=True)
class Start:
    """Where a new run's weights come from: a Hugging Face folder, or, with `checkpoint`, a checkpoint of a run."""

    folder: Path
    checkpoint: CheckpointManifest | None
    group: Group

    def check(self, recipe: Recipe, data: TrainingData) -> None:
        """Raise UserError where a run's backbone, or what its objective kept, is not for this recipe or this data."""
        if self.checkpoint is None:
            return
        source = f"train.init_from {self.folder}"
        alone = "or take the backbone alone: --init-from an export of that run"
        before, model = self._recipe, recipe.model
        _check_shape(before.model, model, self.folder)
        if kind_of(before.objective) is not kind_of(recipe.objective):
            return
        if before.model.embed_dim != model.embed_dim:
            raise UserError(
                f"{source} has an embedding of {before.model.embed_dim}, model.embed_dim is {model.embed_dim}: take "
                f"that, {alone}."
            )
        kind = kind_of(recipe.objective)
        if difference := kind.check_start(self.checkpoint.objective, self.checkpoint.inputs, data):
            raise UserError(f"{source} {difference}, {alone}.")

    @property
    def _recipe(self) -> Recipe:
        """Of the run that it is a checkpoint of."""
        assert self.checkpoint
        return parse_recipe(self.checkpoint.recipe, str(self.folder / CHECKPOINT_NAME))

    def fill_backbone(self, model: ViT) -> list[str]:
        """Fill an initialised backbone; returns what was done, in words. UserError names what does not fit."""
        if self.checkpoint is None:
            return ["the backbone", *load_released(self.folder, model)]
        trained = load_backbone(self.folder)
        return ["the backbone", *_fill(model, trained.config, dict(trained.state_dict()), self.folder)]

    def fill_objective(self, objective: Objective) -> list[str]:
        """Give an objective its first values: from a run's checkpoint, which any number of ranks has written, where it
        is one of the same kind. Returns what was done. Collective.
        """
        if self.checkpoint is None or kind_of(self._recipe.objective) is not type(objective):
            objective.init_weights()
            return []
        pattern = objective.own_files
        names = [name for name in self.checkpoint.files if pattern and pattern.fullmatch(name)]
        check_files(self.folder, self.checkpoint, names, self.group, pattern)
        return objective.start_from(self.folder)


def find_start(recipe: Recipe, data: TrainingData, group: Group) -> Start | None:
    """What train.init_from names; None if it is not set, or if the run has checkpoints of its own. Collective.

    UserError where it does not fit the recipe or the data.
    """
    folder = recipe.train.init_from
    # All ranks use the first rank's view: a run that is still training may have other checkpoints a moment later.
    if folder is None or group.gather_objects(bool(checkpoint_folders(recipe.train.out)))[0]:
        return None
    if group.gather_objects((folder / CONFIG_NAME).exists())[0]:
        folder = group.gather_objects(newest_checkpoint(folder))[0]
    is_ours = (folder / CHECKPOINT_NAME).exists()
    start = Start(folder, read_checkpoint(folder) if is_ours else None, group)
    start.check(recipe, data)
    return start


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
    return _fill(model, config, state, folder)


def _fill(model: ViT, config: ViTConfig, state: dict[str, Tensor], folder: Path) -> list[str]:
    """Copy a state of the shape `config` into a model whose shape differs at most in resolution and embedding.

    Learned positions are resized where the resolution differs; registers may be added.
    """
    _check_shape(config, model.config, folder)
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


def _check_shape(config: ViTConfig, model: ViTConfig, folder: Path) -> None:
    """Raise UserError naming a key in which a given backbone differs from the recipe's, but for what `_fill` adapts."""
    adapted = {"image_size", "embed_dim"} if config.num_registers else {"image_size", "embed_dim", "num_registers"}
    for key, value in model.model_dump(exclude=adapted).items():
        if getattr(config, key) != value:
            raise UserError(f"train.init_from {folder} has {key} {getattr(config, key)}, model.{key} is {value}.")
