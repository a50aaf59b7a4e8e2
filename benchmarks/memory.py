"""The peak of a training step's memory, against what `mlcd plan` predicts for it.

  python benchmarks/memory.py [--json FILE]

The whole trainer (loader, ViT-S/16 in the engine, head) for two steps, in processes of their own for each layout, on
the demo's index and labels (`make demo`, or its first stages); and with CLIP's loss and a text tower as large, on texts
of one token, also beside a frozen ViT-S/16 (LiT). Measured is the peak of torch's allocator: CUDA's own
count, or the profiler's on a CPU, where attention is given in 16 bits, as GPUs have it. What the allocator does not
see (CUDA itself, NCCL, DALI) is not in it. `measured_over_plan` is their ratio, without the head.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from mlcd_ds.artefacts.manifest import library_versions
from mlcd_ds.config import Recipe, load_recipe
from mlcd_ds.data.shard_index import ShardIndex
from mlcd_ds.distributed.ds_config import read_ds_config, zero_buffers
from mlcd_ds.distributed.launch import detect_launch, device_of, process_group
from mlcd_ds.engine import training_data
from mlcd_ds.engine.checkpoint import git_commit
from mlcd_ds.engine.engine_config import read_layout, resolve_ds_config
from mlcd_ds.engine.layout import Layout, plan_batches
from mlcd_ds.engine.phases import phase_at
from mlcd_ds.engine.planned_towers import planned_towers
from mlcd_ds.engine.precision import decide_precision
from mlcd_ds.engine.run_memory import TrainingMemory
from mlcd_ds.engine.trainer import Trainer
from mlcd_ds.engine.training_data import open_data
from mlcd_ds.models import layers
from mlcd_ds.objectives.base import PlannedRun
from mlcd_ds.objectives.registry import kind_of

ROOT = Path(__file__).resolve().parents[1]
MODEL = (
    *("model.image_size=224", "model.patch_size=16", "model.width=384", "model.depth=12", "model.heads=6"),
    *("model.mlp_width=1536", "train.global_batch=32", "train.token_drop=0", "optimizer.warmup_steps=1"),
)
HALVES = "train.micro_batch_per_rank=8"
ONE_RANK = (
    ("zero0_bf16",),
    ("zero1_bf16",),
    ("zero1_bf16", "train.token_drop=0.5"),
    ("zero1_bf16", "train.recompute=mlp"),
    ("zero1_bf16", "train.recompute=block"),
    ("zero1_fp16",),
    ("zero1_fp32_cpu",),
)
TEXT = "text={width: 384, depth: 12, heads: 6, mlp_width: 1536, embed_dim: 128}"
CLIP = ("objective={name: clip}", "head={}", TEXT)
LIT = (*CLIP, "towers.image=frozen")
TWO_RANKS = (
    ("zero1_bf16",),
    ("zero1_bf16", HALVES),
    ("zero2_bf16", HALVES),
    ("zero3_bf16",),
    ("zero3_bf16", HALVES),
    ("tp2_zero1_bf16",),
    ("tp2_zero3_bf16", "train.recompute=mlp"),
)
CLIP_ON_ONE = (("zero0_bf16",), ("zero1_bf16",), ("zero1_bf16", HALVES), ("zero1_fp32_cpu", HALVES))
CLIP_ON_TWO = (
    ("zero0_bf16", HALVES),
    ("zero1_bf16", HALVES),
    ("zero2_bf16",),
    ("zero2_bf16", HALVES, "train.recompute=mlp"),
    ("zero3_bf16",),
    ("zero3_bf16", HALVES),
    ("tp2_zero1_bf16", HALVES),
)
LIT_ON_ONE = (("zero0_bf16",), ("zero1_bf16", HALVES), ("zero1_fp32_cpu",), ("zero1_fp32_cpu", HALVES))
LIT_ON_TWO = (("zero1_bf16",), ("zero3_bf16", HALVES), ("tp2_zero1_bf16",))
# By number of ranks, what is trained beside the layout.
CASES = (
    (1, "", (), ONE_RANK),
    (2, "", (), TWO_RANKS),
    (1, "CLIP, ", CLIP, CLIP_ON_ONE),
    (2, "CLIP, ", CLIP, CLIP_ON_TWO),
    (1, "LiT, ", LIT, LIT_ON_ONE),
    (2, "LiT, ", LIT, LIT_ON_TWO),
)


def allocator_peak(record: profile) -> int:
    """The largest number of bytes that torch had given out on the CPU.

    Added up here: the profiler's own sum misses what threads of gloo give back, and an address that is given out again
    was given back.
    """
    given_out: dict[int, int] = {}
    total = largest = 0
    for event in sorted(_allocations(record.profiler.kineto_results.experimental_event_tree()), key=_time):
        fields = event.extra_fields
        total += max(fields.alloc_size, 0) - given_out.pop(fields.ptr, 0)
        if fields.alloc_size > 0:
            given_out[fields.ptr] = fields.alloc_size
        largest = max(largest, total)
    return largest


def _allocations(events: list) -> list:
    found = [event for event in events if event.tag == torch._C._profiler._EventType.Allocation]
    return found + [inner for event in events for inner in _allocations(event.children)]


def _time(event: Any) -> int:
    return event.start_time_ns


class OneToken:
    """Texts for the text tower: what memory they take does not depend on their words."""

    inputs: ClassVar[dict[str, str]] = {}

    def __init__(self, recipe: Recipe, index: ShardIndex) -> None:
        assert recipe.text
        self._context = recipe.text.context

    def read(self, shards_B: np.ndarray, rows_B: np.ndarray) -> np.ndarray:
        """Zeros [B, L]."""
        return np.zeros((len(rows_B), self._context), dtype=np.int64)


def measure(name: str, *overrides: str) -> None:
    """In a rank's process: print the peak of two steps, and the planner's parts."""
    os.chdir(ROOT)
    path, launch = Path("ds_configs", f"{name}.json"), detect_launch()
    device = device_of(launch)
    config = read_ds_config(path)
    recipe = decide_precision(load_recipe("demo", (*MODEL, *overrides)), config, path)
    training_data.FIELDS["tokens"] = OneToken
    if "fp16" in config:
        config["fp16"]["initial_scale_power"] = 4  # no step is to be left out
    layout: Layout = read_layout(config, path, launch.world_size)
    with process_group(launch) as group, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        if device.type == "cpu":
            layers.attend = F.scaled_dot_product_attention
        ds_config = resolve_ds_config(config, path, recipe, layout, plan_batches(recipe, layout, group.rank))
        data = open_data(recipe, group)
        trainer = Trainer(recipe, ds_config, layout, data, group, device)
        batches = trainer.batches(0)
        for step in range(2):
            trainer.step(step, batches)
        batches.close()
        if recipe.train.checkpoint_every == 1:
            trainer.checkpointer.save(1)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else allocator_peak(record)
    kind, batch_plan = kind_of(recipe.objective), trainer.batch_slice
    plan = TrainingMemory(
        planned_towers(recipe, phase_at(recipe, 0)),
        recipe.train.precision,
        layout,
        recipe.train.recompute,
        zero_buffers(config, path),
        needs_whole_batch=kind.needs_whole_batch,
        has_average=recipe.train.ema_decay is not None,
    ).at_peak(batch_plan.micro_batch, batch_plan.num_micro_batches)
    num_classes = data.labels.num_centers if "labels" in kind.fields else 0
    need = kind.need(recipe, PlannedRun(launch.world_size, layout.tensor_parallel, batch_plan.micro_batch, num_classes))
    plan["objective's state"] = sum(size for name, size in need.memory.items() if name.endswith("state"))
    if launch.is_main:
        sys.stdout.write(json.dumps({"measured": peak, "plan": plan}) + "\n")
        sys.stdout.flush()
    os._exit(0)


def run(num_ranks: int, arguments: tuple[str, ...]) -> dict[str, object]:
    """Start the ranks; the figures of the first."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--layout", *arguments],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONWARNINGS": "ignore"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    told = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{arguments} on {num_ranks} ranks failed")
    found = json.loads(told[0].splitlines()[-1])
    plan = sum(found["plan"].values())
    parts = {f"plan_mib_{name.replace(' ', '_')}": round(size / 2**20, 1) for name, size in found["plan"].items()}
    return {
        "measured_over_plan": round(found["measured"] / plan, 3),
        "measured_mib": round(found["measured"] / 2**20, 1),
        **parts,
    }


def main() -> None:
    """Measure each layout, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--layout", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.layout:
        return measure(*arguments.layout)
    result: dict[str, object] = {}
    is_cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        start = f"{folder}/start"  # LiT's image tower
        run(1, ("zero1_bf16", *CLIP, f"train.out={start}", "train.checkpoint_every=1"))
        Path(start, "config.yaml").write_text("")
        for num_ranks, what, overrides, layouts in CASES:
            if is_cuda and torch.cuda.device_count() < num_ranks:
                continue
            more = (*overrides, f"train.out={folder}/none", *([f"train.init_from={start}"] if overrides == LIT else []))
            for layout in layouts:
                name = f"{what}{', '.join(layout)} on {num_ranks}"
                result[name] = run(num_ranks, (*layout, *more))
                sys.stdout.write(f"{name}: {json.dumps(result[name])}\n")
                sys.stdout.flush()
    result |= {"device": "cuda" if is_cuda else "cpu", "commit": git_commit(), "versions": library_versions()}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
