"""The towers of a run as planner and log see them: what one sample is, and takes, in each."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from mlcd_ds.config import Recipe
from mlcd_ds.engine.phases import Phase
from mlcd_ds.models.noise import TrainingNoise, num_kept
from mlcd_ds.models.text import TextConfig, TextTower, flops_per_text
from mlcd_ds.models.tower import Tower, num_parameters
from mlcd_ds.models.vit import ViT, ViTConfig, flops_per_image
from mlcd_ds.objectives.registry import kind_of


@dataclass(frozen=True)
class PlannedTower(ABC):
    """A tower's shape, and whether it is frozen: whole on each rank, run forward only, without noise."""

    config: Any
    is_frozen: bool = False

    label: ClassVar[str]

    @abstractmethod
    def build(self) -> Tower:
        """The tower itself, without weights."""

    @abstractmethod
    def zeros(self, batch: int) -> tuple[Any, ...]:
        """What its `forward` is given for so many samples."""

    @abstractmethod
    def input_bytes(self, width: int = 4) -> int:
        """Of a sample; `width` bytes of a number that is not whole."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Of a sample, those left out not counted."""

    @property
    @abstractmethod
    def forward_flops(self) -> int:
        """Operations of a sample's forward pass."""

    @property
    def num_looked_up(self) -> int:
        """Parameters from which rows are taken: tensor parallelism does not split them, and autocast does not cast
        them."""
        return 0

    @property
    def num_parameters(self) -> int:
        """Of the whole tower."""
        return _count_parameters(self)

    @property
    def mlp_flops(self) -> int:
        """Of the MLPs in a sample's forward pass."""
        return 4 * self.tokens * self.config.width * self.config.mlp_width * self.config.depth

    def num_on_rank(self, tensor_parallel: int) -> int:
        """Parameters on one of the ranks that share a tower, each of its layers taken to be split."""
        return (self.num_parameters - self.num_looked_up) // tensor_parallel + self.num_looked_up

    def of_depth(self, depth: int) -> PlannedTower:
        """The same with another number of blocks."""
        return replace(self, config=self.config.model_copy(update={"depth": depth}))


@functools.cache
def _count_parameters(tower: PlannedTower) -> int:
    with torch.device("meta"):
        return num_parameters(tower.build())


@dataclass(frozen=True)
class PlannedImage(PlannedTower):
    """A ViT on images of its config's size, `token_drop` of their patches left out."""

    config: ViTConfig
    token_drop: float = 0.0

    label = "backbone"

    def build(self) -> ViT:
        return ViT(self.config)

    def zeros(self, batch: int) -> tuple[Any, ...]:
        images = torch.zeros(batch, 3, self.config.image_size, self.config.image_size)
        return images, TrainingNoise(torch.zeros(batch, dtype=torch.int64), token_drop=self.token_drop)

    def input_bytes(self, width: int = 4) -> int:
        return 3 * self.config.image_size**2 * width

    @property
    def tokens(self) -> int:
        others = self.config.num_other_tokens
        return num_kept(self.config.num_patches, self.token_drop, others) + others

    @property
    def forward_flops(self) -> int:
        return flops_per_image(self.config, token_drop=self.token_drop)


@dataclass(frozen=True)
class PlannedText(PlannedTower):
    """A text tower on texts as long as its context."""

    config: TextConfig

    label = "text tower"

    def build(self) -> TextTower:
        return TextTower(self.config)

    def zeros(self, batch: int) -> tuple[Any, ...]:
        return (torch.zeros(batch, self.config.context, dtype=torch.int64),)

    def input_bytes(self, width: int = 4) -> int:
        return 8 * self.config.context

    @property
    def tokens(self) -> int:
        return self.config.context

    @property
    def forward_flops(self) -> int:
        return flops_per_text(self.config)

    @property
    def num_looked_up(self) -> int:
        return self.config.vocab_size * self.config.width


def _image(recipe: Recipe, phase: Phase) -> PlannedImage:
    is_frozen = recipe.is_frozen("image")
    config = recipe.model.model_copy(update={"image_size": phase.image_size})
    return PlannedImage(config, is_frozen, 0.0 if is_frozen else phase.token_drop)


def _text(recipe: Recipe, phase: Phase) -> PlannedText:
    assert recipe.text, "the recipe was checked"
    return PlannedText(recipe.text, recipe.is_frozen("text"))


TOWERS: dict[str, Callable[[Recipe, Phase], PlannedTower]] = {"image": _image, "text": _text}


def planned_towers(recipe: Recipe, phase: Phase) -> tuple[PlannedTower, ...]:
    """Those whose outputs the objective takes, in the order in which they run."""
    return tuple(TOWERS[name](recipe, phase) for name in kind_of(recipe.objective).towers_of(recipe))


def model_flops(recipe: Recipe, phase: Phase) -> int:
    """Operations that learning from one sample takes: forward in each tower, and backward, twice as much, in those that
    are trained.

    The model's own, of which an MFU is the share: what a run computes twice to save memory (recomputation, and the
    forward pass without gradient where an objective must see all micro-batches at once) is no progress.
    """
    return sum((1 if tower.is_frozen else 3) * tower.forward_flops for tower in planned_towers(recipe, phase))
