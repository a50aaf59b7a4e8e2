"""Trainers within the ranks of a test, without a command line: built from the tiny recipe, driven step by step."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from distributed_harness import TinyData
from torch import Tensor
from training_runs import tiny_recipe

from mlcd_ds.config import Recipe, parse_recipe
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.engine.engine_config import resolve_ds_config
from mlcd_ds.engine.layout import Layout, plan_batches
from mlcd_ds.engine.tensor_parallel import gather_full
from mlcd_ds.engine.trainer import Trainer
from mlcd_ds.engine.training_data import open_training_data


def make_trainer(
    data: TinyData,
    out: Path,
    layout: Layout,
    group: Group,
    precision: str = "fp32",
    optimizer: str = "adamw",
    sections: dict[str, dict[str, object]] | None = None,
) -> Trainer:
    """`sections`: further keys of the recipe, such as `{"train": {"ema_decay": 0.9}}`."""
    os.environ.update(RANK=str(group.rank), WORLD_SIZE=str(group.size), LOCAL_RANK=str(group.rank))
    content = tiny_recipe(data.index, data.labels)
    content["train"] |= {"precision": precision, "out": str(out)}
    content["optimizer"]["name"] = optimizer
    for name, keys in (sections or {}).items():
        content[name] |= keys
    recipe: Recipe = parse_recipe(content, "test")
    config: dict[str, dict[str, int]] = {}
    if precision == "fp16":
        config["fp16"] = {"initial_scale_power": 4, "loss_scale_window": 2}  # the scale changes on the way
    ds_config = resolve_ds_config(config, Path("none"), recipe, layout, plan_batches(recipe, layout, group.rank))
    return Trainer(recipe, ds_config, layout, open_training_data(recipe), group, torch.device("cpu"))


def whole(trainer: Trainer, moment: str | None = None) -> dict[str, Tensor]:
    """All that the engine trains, or a moment of it, as full tensors. Collective."""
    state, group = trainer.state, trainer.groups.tensor
    return {name: gather_full(name, state.get(name, moment), group).clone() for name in state.names}


def go_on(trainer: Trainer, first: int, end: int) -> Tensor:
    """fp64 [steps, 3]: loss and both gradient norms of steps `first` ... `end` - 1."""
    batches, curve = trainer.batches(first), []
    for step in range(first, end):
        result = trainer.step(step, batches)
        curve.append([float(result.loss), float(result.backbone_grad_norm), float(result.measures["grad_norm_head"])])
    batches.close()
    return torch.tensor(curve, dtype=torch.float64)
