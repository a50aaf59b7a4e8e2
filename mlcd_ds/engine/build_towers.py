"""The towers that a recipe describes, filled: those that the engine trains, and those that stay as they are.

A frozen tower lives outside the engine, whole on each rank: DeepSpeed keeps no gradient, moment, fp32 copy or bucket
for it, and cuts it neither by ZeRO nor by tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from mlcd_ds.config import Recipe
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.engine.init_from import Start
from mlcd_ds.engine.weights import (
    TOWERS,
    FrozenTower,
    check_frozen,
    checkpoint_folders,
    frozen_folder,
    read_checkpoint,
    tower_checksum,
)
from mlcd_ds.errors import UserError
from mlcd_ds.models.tower import Tower
from mlcd_ds.models.towers import Towers
from mlcd_ds.objectives.registry import kind_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class BuiltTowers:
    """What the engine gets, the frozen towers with what checkpoints say of them, and what was done, in words."""

    trained: Towers
    frozen: Mapping[str, nn.Module]
    records: dict[str, FrozenTower]
    notes: list[str]


def build_towers(recipe: Recipe, start: Start | None, group: Group) -> BuiltTowers:
    """Initialise all towers, one after the other; fill them from where the run starts. Collective.

    UserError names what does not fit, or a frozen tower that is not the run's any more.
    """
    kind = kind_of(recipe.objective)
    towers = {name: TOWERS[name](recipe) for name in kind.towers_of(recipe)}
    generator = torch.Generator().manual_seed(recipe.train.seed)
    for tower in towers.values():
        tower.init_weights(generator)
    notes = {name: start.fill_tower(tower) if start else [] for name, tower in towers.items()}
    module = kind.engine_module(recipe)
    if module is not None and start:
        notes["objective"] = start.fill_module(module, recipe)
    frozen = {name: tower for name, tower in towers.items() if recipe.is_frozen(name)}
    if start:
        records = {name: _record(name, tower, start, notes[name]) for name, tower in frozen.items()}
    else:
        records = _restored(recipe, frozen, group)
    for tower in frozen.values():
        tower.to(DTYPES[recipe.train.precision]).requires_grad_(False).eval()
    trained = {name: tower for name, tower in towers.items() if name not in frozen}
    return BuiltTowers(Towers(trained, module), frozen, records, [note for some in notes.values() for note in some])


def _record(name: str, tower: Tower, start: Start, notes: list[str]) -> FrozenTower:
    """What checkpoints say of a frozen tower, which was filled with those notes. UserError where not all of it was."""
    if not notes:
        raise UserError(f"train.init_from {start.folder} holds no {name} tower, and towers.{name} is frozen.")
    if random := [note for note in notes if "at random" in note]:
        raise UserError(f"train.init_from {start.folder}: {random[0]}, and towers.{name} is frozen.")
    return FrozenTower(source=str(start.folder.resolve()), sha256=tower_checksum(tower))


def _restored(recipe: Recipe, frozen: Mapping[str, Tower], group: Group) -> dict[str, FrozenTower]:
    """Fill the frozen towers of a run that goes on from its own newest checkpoint, which names them."""
    if not frozen:
        return {}
    records = read_checkpoint(group.gather_objects(checkpoint_folders(recipe.train.out))[0][-1]).frozen
    for name, tower in frozen.items():
        Start.at(frozen_folder(name, records[name]), group).fill_tower(tower)
        check_frozen(name, records[name], tower)
    return records
