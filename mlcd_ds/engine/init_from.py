"""Starting a run from given weights: a run of ours, towers and objective; or a Hugging Face folder, its towers (and
CLIP's scale, where it is a whole CLIP model).

Only the weights are taken: the optimizer's state, the step and the order of samples are the new run's own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mlcd_ds.artefacts.readers import decoding, read_tensors
from mlcd_ds.config import Recipe, parse_recipe
from mlcd_ds.data.fields import TrainingData
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.engine.checkpoint import check_files
from mlcd_ds.engine.released import Released, check_shape, check_text_shape, read_released
from mlcd_ds.engine.weights import (
    CHECKPOINT_NAME,
    CONFIG_NAME,
    WEIGHT_FILES,
    CheckpointManifest,
    checkpoint_folders,
    fill_from,
    newest_checkpoint,
    older_checkpoint,
    read_checkpoint,
)
from mlcd_ds.errors import UserError
from mlcd_ds.models.tower import Tower
from mlcd_ds.models.vit import ViT
from mlcd_ds.objectives.base import Objective
from mlcd_ds.objectives.pair_objective import Scale, first_scale
from mlcd_ds.objectives.registry import kind_of


@dataclass(frozen=True)
class Start:
    """Where a new run's weights come from: a Hugging Face folder, or, with `checkpoint`, a checkpoint of a run."""

    folder: Path
    checkpoint: CheckpointManifest | None
    group: Group

    @classmethod
    def at(cls, folder: Path, group: Group) -> Start:
        """At a checkpoint's folder, or a Hugging Face folder."""
        return cls(folder, read_checkpoint(folder) if (folder / CHECKPOINT_NAME).exists() else None, group)

    def check(self, recipe: Recipe, data: TrainingData) -> None:
        """Raise UserError where a run's backbone, or what its objective kept, is not for this recipe or this data."""
        if self.checkpoint is None:
            return
        source = f"train.init_from {self.folder}"
        alone = "or take the backbone alone: --init-from an export of that run"
        before, model = self._recipe, recipe.model
        if before.text and recipe.text:
            check_text_shape(before.text, recipe.text, self.folder)
            if self.checkpoint.inputs.get("tokenizer") != data.inputs.get("tokenizer"):
                raise UserError(
                    f"{source}: its text tower was trained with another tokenizer than data.tokenizer "
                    f"{recipe.data.tokenizer}: name that one; a run of ours keeps it as tokenizer.json in its folder."
                )
        check_shape(before.model, model, self.folder)
        if not self.has_state_for(recipe):
            return
        if before.model.embed_dim != model.embed_dim:
            raise UserError(
                f"{source} has an embedding of {before.model.embed_dim}, model.embed_dim is {model.embed_dim}: take "
                f"that, {alone}."
            )
        kind = kind_of(recipe.objective)
        if difference := kind.check_start(recipe, self.checkpoint.objective, self.checkpoint.inputs, data):
            raise UserError(f"{source} {difference}, {alone}.")

    @property
    def _recipe(self) -> Recipe:
        """Of the run that it is a checkpoint of."""
        assert self.checkpoint
        return parse_recipe(self.checkpoint.recipe, str(self.folder / CHECKPOINT_NAME))

    def fill_tower(self, tower: Tower) -> list[str]:
        """Fill an initialised tower; returns what was done, in words: nothing, where the source has no text tower for
        it. UserError names what does not fit."""
        if not isinstance(tower, ViT) and not self._has_text_tower():
            return []
        filled = fill_from(self.folder, tower) if self.checkpoint else self._released.fill(tower)
        return ["the backbone" if isinstance(tower, ViT) else "the text tower", *filled]

    def _has_text_tower(self) -> bool:
        return self._recipe.text is not None if self.checkpoint else self._released.has_text()

    @functools.cached_property
    def _released(self) -> Released:
        """The folder's content, where it is no checkpoint."""
        return read_released(self.folder)

    def fill_module(self, module: nn.Module, recipe: Recipe) -> list[str]:
        """Fill what the engine trains for a recipe's objective, where the source has the same; returns what was
        done."""
        if self.checkpoint is None:
            scale = first_scale(module)
            is_filled = scale is not None and self._has_text_tower() and self._released.fill_scale(scale)
            return ["the scale"] if is_filled else []
        file_name = WEIGHT_FILES["objective"]
        if not self.has_state_for(recipe) or file_name not in self.checkpoint.files:
            return []
        path, fix = self.folder / file_name, f"{older_checkpoint(self.folder)} Or take another objective."
        tensors = read_tensors(path, fix, self.checkpoint.files[file_name])
        with decoding(path, fix):
            module.load_state_dict(tensors)
        return ["the scale" if isinstance(module, Scale) else "the objective's own parameters"]

    def has_state_for(self, recipe: Recipe) -> bool:
        """Whether it is of a run whose objective keeps what the one of this recipe keeps."""
        if self.checkpoint is None:
            return False
        names = [kind_of(each.objective).state_name(each) for each in (recipe, self._recipe)]
        return names[0] == names[1]

    def fill_objective(self, objective: Objective, recipe: Recipe) -> list[str]:
        """Give a recipe's objective its first values: from a run's checkpoint, which any number of ranks has written,
        where it is one of the same kind. Returns what was done. Collective.
        """
        if self.checkpoint is None or not self.has_state_for(recipe):
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
    start = Start.at(folder, group)
    start.check(recipe, data)
    return start
