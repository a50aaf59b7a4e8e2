"""A weighted sum of objectives over the same batch: MLCD + CLIP, xCLIP (arXiv 2210.09304: CLIP + lambda3 nCLIP)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from mlcd_ds.artefacts.typed import Frozen
from mlcd_ds.data.fields import TrainingData
from mlcd_ds.data.order import Order
from mlcd_ds.distributed.groups import ParallelGroups
from mlcd_ds.errors import UserError
from mlcd_ds.objectives.base import Embed, Given, Need, Objective, OwnOutputs, PlannedRun
from mlcd_ds.objectives.single import KINDS, SingleConfig, kind_among
from mlcd_ds.recipes.sections import ObjectiveConfig, Sections


class PartConfig(Frozen):
    """A summand."""

    weight: float = Field(1.0, gt=0, le=1e4, description="factor on its loss")
    objective: SingleConfig = Field(description="its name and settings, as where it stands alone")


class SumConfig(ObjectiveConfig):
    """Objectives of different kinds; each reads the recipe's other sections as if it stood alone."""

    name: Literal["sum"] = "sum"
    parts: tuple[PartConfig, ...] = Field(min_length=2, description="the objectives that are added up")


def parts_of(recipe: Sections) -> Iterator[tuple[float, type[Objective], Sections]]:
    """Weight and kind of each part, and the recipe in which it stands alone."""
    assert isinstance(recipe.objective, SumConfig)
    for part in recipe.objective.parts:
        yield part.weight, kind_among(KINDS, part.objective), recipe.model_copy(update={"objective": part.objective})


@contextmanager
def _of_part(number: int) -> Iterator[None]:
    """Messages about `objective.KEY` name the part's key."""
    try:
        yield
    except (ValueError, UserError) as error:
        raise type(error)(str(error).replace("objective.", f"objective.parts.{number}.objective.")) from None


def _joined(lists: Iterator[tuple[str, ...]]) -> tuple[str, ...]:
    """All of them in order, each once."""
    return tuple(dict.fromkeys(name for names in lists for name in names))


class Sum(Objective):
    """Parts by themselves, called on the same outputs; their losses and gradients are added up."""

    config_type = SumConfig
    sections = _joined(kind.sections for kind in KINDS)

    def __init__(self, recipe: Sections, data: TrainingData, groups: ParallelGroups, device: torch.device) -> None:
        parts = [(weight, kind, kind(own, data, groups, device)) for weight, kind, own in parts_of(recipe)]
        self._weights = [weight for weight, _, _ in parts]
        self.parts = [part for _, _, part in parts]
        self._names = [own.objective.name for _, _, own in parts_of(recipe)]
        patterns = [part.own_files.pattern for part in self.parts if part.own_files]
        self.own_files = re.compile("|".join(patterns)) if patterns else None

    # Before anything is built.

    @classmethod
    def sections_of(cls, recipe: Sections) -> tuple[str, ...]:
        return _joined(kind.sections_of(own) for _, kind, own in parts_of(recipe))

    @classmethod
    def towers_of(cls, recipe: Sections) -> tuple[str, ...]:
        return _joined(kind.towers_of(own) for _, kind, own in parts_of(recipe))

    @classmethod
    def fields_of(cls, recipe: Sections) -> tuple[str, ...]:
        return _joined(kind.fields_of(own) for _, kind, own in parts_of(recipe))

    @classmethod
    def sees_whole_batch(cls, recipe: Sections) -> bool:
        """Where one part does, all do: a mean over images may be taken of the whole batch, too."""
        return any(kind.sees_whole_batch(own) for _, kind, own in parts_of(recipe))

    @classmethod
    def check(cls, recipe: Sections) -> None:
        names = [own.objective.name for _, _, own in parts_of(recipe)]
        kept: dict[str, int] = {}  # what a part keeps, and the part's number
        for number, (_, kind, own) in enumerate(parts_of(recipe)):
            for thing in (kind.__name__, *kind.output_names):
                if (other := kept.setdefault(thing, number)) != number:
                    raise ValueError(
                        f"objective.parts has {names[other]} and {names[number]}, which keep the same (class centres, "
                        "or a learned scale): take one of them"
                    )
            if all(recipe.is_frozen(tower) for tower in kind.towers_of(own)):
                raise ValueError(
                    f"objective.parts has {names[number]}, whose towers are all frozen, so it would train none of "
                    "them: leave the part out, or set towers.image=trained"
                )
            with _of_part(number):
                kind.check(own)

    @classmethod
    def check_layout(cls, recipe: Sections, num_ranks: int, tensor_parallel: int) -> None:
        for number, (_, kind, own) in enumerate(parts_of(recipe)):
            with _of_part(number):
                kind.check_layout(own, num_ranks, tensor_parallel)

    @classmethod
    def check_device(cls, recipe: Sections, device: torch.device) -> None:
        for number, (_, kind, own) in enumerate(parts_of(recipe)):
            with _of_part(number):
                kind.check_device(own, device)

    @classmethod
    def check_data(cls, recipe: Sections, data: TrainingData) -> None:
        for number, (_, kind, own) in enumerate(parts_of(recipe)):
            with _of_part(number):
                kind.check_data(own, data)

    @classmethod
    def state_name(cls, recipe: Sections) -> str:
        return " + ".join(kind.state_name(own) for _, kind, own in parts_of(recipe))

    @classmethod
    def check_start(
        cls, recipe: Sections, note: dict[str, int], inputs: dict[str, str], data: TrainingData
    ) -> str | None:
        problems = (kind.check_start(own, note, inputs, data) for _, kind, own in parts_of(recipe))
        return next((problem for problem in problems if problem), None)

    @classmethod
    def step_kind(cls, recipe: Sections, step: int) -> object:
        return [kind.step_kind(own, step) for _, kind, own in parts_of(recipe)]

    @classmethod
    def describe(cls, recipe: Sections, data: TrainingData, num_ranks: int, tensor_parallel: int) -> list[str]:
        lines = []
        for weight, kind, own in parts_of(recipe):
            lines.append(f"objective: {weight:g} x {own.objective.name}")
            lines += kind.describe(own, data, num_ranks, tensor_parallel)
        return lines

    @classmethod
    def need(cls, recipe: Sections, run: PlannedRun) -> Need:
        share = 1.0
        if cls.sees_whole_batch(recipe):  # each part is called once a step, with all that a rank has
            share = run.micro_batch / run.per_rank(recipe)
            run = replace(run, micro_batch=run.per_rank(recipe))
        needs = [kind.need(own, run) for _, kind, own in parts_of(recipe)]
        memory: dict[str, int] = {}
        for need in needs:
            for use, size in need.memory.items():
                memory[use] = memory.get(use, 0) + size
        what = " and ".join(need.what for need in needs)
        return Need(memory, share * sum(need.sent for need in needs), what, sum(need.flops for need in needs))

    @classmethod
    def engine_module(cls, recipe: Sections) -> nn.Module | None:
        modules = {own.objective.name: kind.engine_module(own) for _, kind, own in parts_of(recipe)}
        found = {name: module for name, module in modules.items() if module is not None}
        return PartModules(found) if found else None

    @classmethod
    def sample_order(cls, recipe: Sections, counts_S: np.ndarray) -> Order:
        """Of the part that has one of its own, if one has."""
        parts = list(parts_of(recipe))
        kind, own = next(((kind, own) for _, kind, own in parts if kind.has_own_order), parts[0][1:])
        return kind.sample_order(own, counts_S)

    # While a run trains.

    def init_weights(self) -> None:
        for part in self.parts:
            part.init_weights()

    def start_from(self, folder: Path) -> list[str]:
        return [note for part in self.parts for note in part.start_from(folder)]

    def begin_phase(self, step: int, embed: Embed, own_outputs: OwnOutputs) -> bool:
        return any([part.begin_phase(step, embed, own_outputs) for part in self.parts])

    def still_towers(self, step: int) -> tuple[str, ...]:
        return _joined(part.still_towers(step) for part in self.parts)

    def begin_step(self, step: int) -> None:
        for part in self.parts:
            part.begin_step(step)

    def __call__(self, outputs: Mapping[str, Tensor], fields: Mapping[str, Tensor], weight: float = 1.0) -> Given:
        """Loss and gradients of all parts. Collectives: those of the parts, one part after the other."""
        parts: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        losses = []
        for name, factor, part in zip(self._names, self._weights, self.parts, strict=True):
            given = part(outputs, fields, weight * factor)
            losses.append(given.loss * factor)
            parts |= {f"{name}_{key}": value * factor for key, value in given.parts.items()}
            for output, gradient in given.gradients.items():
                scaled = gradient * factor
                gradients[output] = gradients[output] + scaled if output in gradients else scaled
        return Given(torch.stack(losses).sum(), parts, gradients)

    def step(self, lr: float) -> dict[str, Tensor]:
        return {name: measure for part in self.parts for name, measure in part.step(lr).items()}

    def take_counts(self) -> dict[str, int]:
        return {name: count for part in self.parts for name, count in part.take_counts().items()}

    @property
    def is_finite(self) -> bool:
        return all(part.is_finite for part in self.parts)

    def note(self) -> dict[str, int]:
        return {name: number for part in self.parts for name, number in part.note().items()}

    def save(self, folder: Path) -> None:
        for part in self.parts:
            part.save(folder)

    def load(self, folder: Path) -> None:
        for part in self.parts:
            part.load(folder)


class PartModules(nn.Module):
    """The modules of the parts, by their names; their outputs together."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What all parts add to the towers' outputs."""
        return {name: value for module in self.children() for name, value in module(outputs).items()}
