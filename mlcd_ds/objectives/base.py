"""What an objective is to the rest: the fields it needs, the small parameters that live in the engine, a loss and the
gradient of each output, and whatever it keeps and steps itself.

Trainer, checkpoints and planner know only this and `registry.py`. An objective is a class in a file of its own, and a
line in `single.py`. Most methods have a default: nothing to check, to keep or to plan.

B images of a micro-batch on this rank, E embedding.
"""
# ruff: noqa: B027  by default there is nothing to do

from __future__ import annotations

import re
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mlcd_ds.data.fields import TrainingData
from mlcd_ds.data.order import Order, SampleOrder
from mlcd_ds.distributed.groups import ParallelGroups
from mlcd_ds.recipes.sections import ObjectiveConfig, Sections

TOWERS = ("image", "text")
APART = 2**32  # added to a run's seed for what an objective draws: the towers are drawn by the seed itself
RAW = "raw_"  # before the name of a tower: its embeddings as they are, fp32 [B, E]


class Embed(Protocol):
    """A tower as it is now, without noise: features [B, D] of what it is given, or embeddings [B, E]. Collective."""

    def __call__(self, tower: str, given: Tensor, *, is_projected: bool) -> Tensor: ...


OwnOutputs = Callable[[], Mapping[str, Tensor]]
"""What an objective's module gives as it is now, where it needs no tower's outputs for it. Collective."""


def has_rows(output: str) -> bool:
    """Whether an output has a row for each image: those of towers. What an objective's module adds has none."""
    return output.removeprefix(RAW) in TOWERS


@dataclass(frozen=True)
class Given:
    """What an objective makes of a batch. The loss and its parts, which add up to it: means over the global batch,
    without gradient; and this rank's share of the loss's gradient by each output: rows of its own images, complete; or,
    of what has no rows, a summand of all ranks'.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    gradients: dict[str, Tensor]

    def shares(self, count: int) -> list[Given]:
        """Of a batch as a whole, what each of its `count` micro-batches is given: its own rows; and of what has no rows
        an equal summand, as each forward pass has that output again."""
        split = {
            name: gradient.chunk(count) if has_rows(name) else (gradient / count,) * count
            for name, gradient in self.gradients.items()
        }
        gradients = ({name: parts[number] for name, parts in split.items()} for number in range(count))
        return [Given(self.loss, self.parts, given) for given in gradients]


def join_outputs(micro_batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The outputs of a whole batch; of what has no rows, each micro-batch has the same."""
    first = micro_batches[0]
    return {
        name: torch.cat([outputs[name] for outputs in micro_batches]) if has_rows(name) else first[name]
        for name in first
    }


def join_fields(micro_batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The fields of a whole batch."""
    return {name: torch.cat([fields[name] for fields in micro_batches]) for name in micro_batches[0]}


@dataclass(frozen=True)
class PlannedRun:
    """What a plan assumes: ranks, those of a tensor-parallel group, images of a rank's micro-batch, classes."""

    num_ranks: int
    tensor_parallel: int
    micro_batch: int
    num_classes: int

    def per_rank(self, recipe: Sections) -> int:
        """Images of a step on a rank."""
        return recipe.train.global_batch * self.tensor_parallel // self.num_ranks


@dataclass(frozen=True)
class Need:
    """What an objective needs on a GPU: bytes by use; bytes that it sends for a micro-batch, which the step waits for;
    what it computes a step, in words, and its operations."""

    memory: dict[str, int]
    sent: float
    what: str
    flops: float


def engine_memory(count: int, run: PlannedRun) -> dict[str, int]:
    """Bytes of so many parameters of an objective in the engine: weights and gradients, the copies of both that the
    loss takes and gives, all fp32; AdamW's states, shared by the ranks (ZeRO)."""
    states = 12 * count * run.tensor_parallel // run.num_ranks
    return {"objective: weights and gradients": 16 * count, "objective: optimizer states": states}


class Objective(ABC):
    """A loss, and all that belongs to it outside the engine. A subclass overrides what differs."""

    config_type: ClassVar[type[ObjectiveConfig]]
    """Its `objective:` section; the literals of its `name` are the names under which a recipe asks for it."""
    sections: ClassVar[tuple[str, ...]] = ()
    """Other sections of a recipe that may be for it; what these say is refused for objectives that do not list them."""
    towers: ClassVar[tuple[str, ...]] = ("image",)
    """Whose outputs it takes: see `towers_of`."""
    fields: ClassVar[tuple[str, ...]] = ()
    """What a batch must bring besides images (data/fields.py): see `fields_of`."""
    needs_whole_batch: ClassVar[bool] = False
    """Whether it must be called once for all micro-batches of a step, as its loss is not a mean over images: see
    `sees_whole_batch`."""
    output_names: ClassVar[tuple[str, ...]] = ()
    """Outputs that its module in the engine may add."""
    has_own_order: ClassVar[bool] = False
    """Whether `sample_order` is its own."""
    own_files: re.Pattern[str] | None = None
    """Names of the files that `save` writes."""

    def __init__(self, recipe: Sections, data: TrainingData, groups: ParallelGroups, device: torch.device) -> None:
        """Make room for what it keeps. Collective. `init_weights`, `start_from` or `load` comes next."""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names under which a recipe asks for it."""
        return typing.get_args(cls.config_type.model_fields["name"].annotation)

    # Before anything is built. What is the same for every recipe is said above.

    @classmethod
    def sections_of(cls, recipe: Sections) -> tuple[str, ...]:
        """Other sections that are for it in this recipe."""
        return cls.sections

    @classmethod
    def towers_of(cls, recipe: Sections) -> tuple[str, ...]:
        """Whose outputs it takes."""
        return cls.towers

    @classmethod
    def fields_of(cls, recipe: Sections) -> tuple[str, ...]:
        """What a batch must bring besides images."""
        return cls.fields

    @classmethod
    def sees_whole_batch(cls, recipe: Sections) -> bool:
        """Whether it is called once for all micro-batches of a step."""
        return cls.needs_whole_batch

    @classmethod
    def check(cls, recipe: Sections) -> None:
        """Raise ValueError naming the keys that do not go together."""

    @classmethod
    def check_layout(cls, recipe: Sections, num_ranks: int, tensor_parallel: int) -> None:
        """Raise UserError naming the numbers where its parts cannot be shared so."""

    @classmethod
    def check_device(cls, recipe: Sections, device: torch.device) -> None:
        """Raise UserError where the device lacks what the recipe asks for."""

    @classmethod
    def check_data(cls, recipe: Sections, data: TrainingData) -> None:
        """Raise UserError naming what the fields lack."""

    @classmethod
    def state_name(cls, recipe: Sections) -> str:
        """By which two runs are told to keep the same kind of state: one can be a start for the other."""
        return cls.__name__

    @classmethod
    def check_start(
        cls, recipe: Sections, note: dict[str, int], inputs: dict[str, str], data: TrainingData
    ) -> str | None:
        """Why the state of another run cannot be a start for this data, and what to give instead; None where it can.

        `note` and `inputs` are of that run's checkpoint.
        """
        return None

    @classmethod
    def step_kind(cls, recipe: Sections, step: int) -> object:
        """What a step does, where that depends on its place among train.steps: which may change only as long as the
        steps done would have been of the same kinds."""
        return None

    @classmethod
    def describe(cls, recipe: Sections, data: TrainingData, num_ranks: int, tensor_parallel: int) -> list[str]:
        """Lines for `--dry-run`."""
        return []

    @classmethod
    def need(cls, recipe: Sections, run: PlannedRun) -> Need:
        """For `mlcd plan`."""
        return Need({}, 0.0, "the loss", 0.0)

    @classmethod
    def engine_module(cls, recipe: Sections) -> nn.Module | None:
        """Small parameters that the engine trains: a module, initialised, that maps the towers' outputs to outputs of
        its own, none of which has rows. It may give its parameters themselves, as copies (ZeRO stage 3 frees them)."""
        return None

    @classmethod
    def sample_order(cls, recipe: Sections, counts_S: np.ndarray) -> Order:
        """Which sample comes when; `counts_S`: samples of each shard."""
        return SampleOrder(counts_S, recipe.data.num_streams, recipe.data.shuffle_window, recipe.train.seed)

    # While a run trains.

    def init_weights(self) -> None:
        """Set what it keeps to its first values. Collective."""

    def start_from(self, folder: Path) -> list[str]:
        """Take weights, and nothing else, from a checkpoint of such an objective, its files checked already. Returns
        what was taken, in words. Collective."""
        return []

    def begin_phase(self, step: int, embed: Embed, own_outputs: OwnOutputs) -> bool:
        """Before every step: where a phase of several steps begins with it, make what holds in the phase. Returns
        whether that took any time. Collective."""
        return False

    def still_towers(self, step: int) -> tuple[str, ...]:
        """Towers that this step leaves as they are, although they are trained."""
        return ()

    def begin_step(self, step: int) -> None:
        """Draw what a step needs, as a function of the seed and the step."""

    @abstractmethod
    def __call__(self, outputs: Mapping[str, Tensor], fields: Mapping[str, Tensor], weight: float = 1.0) -> Given:
        """Loss and gradients of a micro-batch, or of the whole batch. No autograd: `outputs` are values.

        Embeddings have unit length, fp32 [B, E]; of trained towers there are raw ones, too. `fields` have, besides
        those it asked for, `ids`, the images' places among the run's samples, and `keys`, those of their noise in this
        epoch: int64 [B]. `weight`: factor on the gradients of what it keeps itself. B is the same on every rank. Says
        which collectives it calls.
        """

    def step(self, lr: float) -> dict[str, Tensor]:
        """Move what it keeps itself, at the end of a step; `lr` is the engine's rate. Returns what is worth logging."""
        return {}

    def take_counts(self) -> dict[str, int]:
        """What it has counted since the last call, to be logged. The host waits."""
        return {}

    @property
    def is_finite(self) -> bool:
        """Whether all that `save` would write is finite. The host waits."""
        return True

    def note(self) -> dict[str, int]:
        """Numbers for checkpoint.json, by which `check_start` can tell what is in the files."""
        return {}

    def save(self, folder: Path) -> None:
        """Write this rank's part of what it keeps. Raises OSError where that cannot be written."""

    def load(self, folder: Path) -> None:
        """Restore what any number of ranks has saved. UserError names a damaged file or what is missing."""
