"""Trainers of two towers on the tiny shard: CLIP, SigLIP, and LiT on an image tower of its own."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

import torch
import trainers
from distributed_harness import TinyData, assert_close
from torch import Tensor
from training_runs import tiny_recipe

from mlcd_ds.config import dump_recipe, parse_recipe
from mlcd_ds.data.tokenizers import train_tokenizer
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.engine import training_data
from mlcd_ds.engine.engine_config import resolve_ds_config
from mlcd_ds.engine.layout import Layout, plan_batches
from mlcd_ds.engine.trainer import Trainer

NUM_TOKENS = 280
NCLIP = {"name": "nclip", "num_dims": 48, "head_width": 12}
MLCD = {"name": "mlcd", "scale": 16.0}
PROTOCLIP = {"name": "protoclip", "episode_samples": 48, "num_clusters": 6, "num_iterations": 8, "num_restarts": 2}
PROTOCLIP |= {"head_hidden": 24, "head_dim": 8, "infonce_episodes": 0}  # two steps an episode, of which a run has four
OBJECTIVES: dict[str, dict[str, Any]] = {
    "siglip": {"name": "siglip"},
    "nclip": NCLIP,
    "xclip": {"name": "sum", "parts": [{"objective": {"name": "clip"}}, {"weight": 0.3, "objective": NCLIP}]},
    "mlcd + clip": {"name": "sum", "parts": [{"weight": 0.7, "objective": MLCD}, {"objective": {"name": "clip"}}]},
    "mlcd + protoclip": {"name": "sum", "parts": [{"objective": MLCD}, {"weight": 0.5, "objective": PROTOCLIP}]},
}


def write_tokenizer(data: TinyData) -> Path:
    """One learned from the captions of the tiny shard."""
    path = data.index.parent / f"tokenizer-{os.getpid()}.json"
    with tarfile.open(data.shard) as archive:
        members = [archive.extractfile(name) for name in archive.getnames() if name.endswith(".txt")]
        captions = [member.read().decode() for member in members if member]
    path.write_text(train_tokenizer(iter(captions), NUM_TOKENS, "tiny").to_json())
    return path


def make_trainer(
    data: TinyData,
    out: Path,
    layout: Layout,
    group: Group,
    name: str,
    micro_batches: int,
    sections: dict[str, dict[str, Any]] | None = None,
    **model: int,
) -> Trainer:
    """`name`: one of OBJECTIVES, or clip, lit (frozen image tower of the run "mlcd" beside `out`), or bf16 (clip)."""
    content = tiny_recipe(data.index, data.labels)
    head = content["head"] if "mlcd" in name else {}
    content |= {"objective": OBJECTIVES.get(name, {"name": "clip"}), "head": head}
    content["train"]["precision"] = "bf16" if name == "bf16" else "fp32"
    if name == "lit":
        content["towers"] = {"image": "frozen"}
        content["train"]["init_from"] = str(out.parent / "mlcd")
    content["model"]["heads"] = content["data"]["num_streams"] = 4
    content["train"] |= {"micro_batch_per_rank": 24 // layout.data_parallel // micro_batches, "out": str(out)}
    content["model"] |= model
    content["data"]["tokenizer"] = str(write_tokenizer(data))
    content["text"] = dict(vocab_size=NUM_TOKENS, context=8, width=32, depth=1, heads=4, mlp_width=64, end_token=1)
    content["text"]["embed_dim"] = content["model"]["embed_dim"]
    for section, keys in (sections or {}).items():
        content[section] |= keys
    recipe = parse_recipe(content, "test")
    ds_config = resolve_ds_config({}, Path("none"), recipe, layout, plan_batches(recipe, layout, group.rank))
    opened = training_data.open_training_data(recipe)
    return Trainer(recipe, ds_config, layout, opened, group, torch.device("cpu"))


def train_mlcd(data: TinyData, out: Path, group: Group) -> None:
    """A run of one step, for LiT to start from: the same on any number of ranks but for rounding."""
    sections = {"model": {"heads": 4}, "data": {"num_streams": 4}}
    trainer = trainers.make_trainer(data, out, Layout(group.size, 1, 0), group, sections=sections)
    trainer.step(0, trainer.batches(0))
    trainer.checkpointer.save(1)
    trainer.engine.destroy()
    if group.is_main:
        (out / "config.yaml").write_text(dump_recipe(trainer.recipe))
    group.barrier()


def assert_as_one_process(
    what: str,
    got: tuple[Tensor, dict[str, Tensor]],
    right: tuple[Tensor, dict[str, Tensor]],
    curve_tolerance: float,
    weight_tolerance: float,
) -> None:
    """Curves of `go_on`, and all weights that one process has, too."""
    for column, value in enumerate(("loss", "norm", "scale")):
        assert_close(f"{what}: {value}", got[0][:, column], right[0][:, column], curve_tolerance)
    for key, weight in right[1].items():
        if not key.endswith("k_proj.bias"):  # no gradient there but rounding
            assert_close(f"{what}: {key}", got[1][key], weight, weight_tolerance)


def go_on(trainer: Trainer, first: int, end: int) -> Tensor:
    """fp64 [steps, 3]: loss, gradient norm, scale."""
    batches, curve = trainer.batches(first), []
    for step in range(first, end):
        result = trainer.step(step, batches)
        scale = result.measures.get("logit_scale", 0.0)
        curve.append([float(x) for x in (result.loss, result.backbone_grad_norm or 0.0, scale)])
    batches.close()
    return torch.tensor(curve, dtype=torch.float64)
