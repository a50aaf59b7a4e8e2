"""ProtoCLIP's trainers on the tiny shard: four episodes of two steps, with an external teacher."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from distributed_harness import TinyData
from pair_trainers import make_trainer
from torch import Tensor

from mlcd_ds.distributed.collectives import Group
from mlcd_ds.engine.layout import Layout
from mlcd_ds.engine.trainer import Trainer
from mlcd_ds.objectives.protoclip import ProtoClip

# Two steps an episode, four episodes: CLIP's loss alone, twice with prototypes, and with the image tower left alone.
NUM_STEPS = 8
OBJECTIVE = {"name": "protoclip", "episode_samples": 48, "num_clusters": 6, "num_iterations": 8, "num_restarts": 2}
OBJECTIVE |= {"head_hidden": 24, "head_dim": 8, "frozen_episodes": 1, "teacher_dim": 5}


def build(data: TinyData, out: Path, layout: Layout, group: Group, micro_batches: int, **changes: Any) -> Trainer:
    os.environ.update(RANK=str(group.rank), WORLD_SIZE=str(group.size), LOCAL_RANK=str(group.rank))
    objective = {**OBJECTIVE, "teacher": str(data.embeddings), **changes}
    sections = {"objective": objective, "optimizer": {"warmup_steps": 1}}
    return make_trainer(data, out, layout, group, "clip", micro_batches, sections=sections)


def go_on(trainer: Trainer, first: int, end: int) -> Tensor:
    """fp64 [steps, 5]: loss, its terms, and the prototypes' scale."""
    batches, curve = trainer.batches(first), []
    for step in range(first, end):
        result = trainer.step(step, batches)
        values = [result.loss, *(result.loss_parts[name] for name in ("clip", "proto", "external"))]
        curve.append([float(value) for value in (*values, result.measures["proto_scale"])])
    batches.close()
    return torch.tensor(curve, dtype=torch.float64)


def protoclip_of(trainer: Trainer) -> ProtoClip:
    assert isinstance(trainer.objective, ProtoClip)
    return trainer.objective
