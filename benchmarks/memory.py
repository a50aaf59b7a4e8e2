"""What a training step takes in memory, against what `mlcd plan` predicts for it.

  python benchmarks/memory.py [--json FILE]

A process of its own for each layout: a ViT-B/16 in DeepSpeed's engine on one rank, two steps. Measured is the growth of
the peak from before the model is built to after the steps: of the GPU's allocator, or of the resident memory on a CPU.
Predicted are the planner's backbone parts. `measured_over_plan` is their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch

from mlcd_ds.config import OptimizerConfig
from mlcd_ds.distributed.deepspeed import initialize_engine, step_engine
from mlcd_ds.distributed.launch import detect_launch, process_group
from mlcd_ds.engine.checkpoint import git_commit
from mlcd_ds.engine.layout import Layout
from mlcd_ds.engine.memory import DTYPES, activation_bytes, state_bytes
from mlcd_ds.engine.optimizer import backbone_optimizer
from mlcd_ds.manifest import library_versions
from mlcd_ds.models.vit import ViT, ViTConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 128 if DEVICE.type == "cuda" else 12
VIT = ViTConfig(image_size=224, patch_size=16, width=768, depth=12, heads=12, mlp_width=3072, embed_dim=512)
LAYOUTS = [
    ("fp32", 0, "none"),
    ("fp32", 1, "none"),
    ("bf16", 1, "none"),
    ("bf16", 2, "none"),
    ("bf16", 3, "none"),
    ("bf16", 1, "mlp"),
    ("bf16", 1, "block"),
]


def peak_bytes() -> int:
    """The largest memory so far."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated(DEVICE)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def predicted_bytes(precision: str, stage: int, recompute: str) -> int:
    """The planner's backbone parts for one rank."""
    states = sum(state_bytes(VIT, precision, Layout(1, 1, stage)).values())
    return states + BATCH * activation_bytes(VIT, precision, recompute, 0.0)


def measure(precision: str, stage: int, recompute: str) -> None:
    """In a process of its own: print the growth of the peak over two steps."""
    predicted_bytes(precision, stage, recompute)  # its own models come before the baseline
    config = {"train_batch_size": BATCH, "zero_optimization": {"stage": stage}, "gradient_clipping": 5.0}
    config |= {"bf16": {"enabled": precision == "bf16"}, "steps_per_print": 10**9}
    with process_group(detect_launch()):
        images = torch.zeros(BATCH, 3, VIT.image_size, VIT.image_size, device=DEVICE, dtype=DTYPES[precision])
        before = peak_bytes()
        model = ViT(VIT)
        model.init_weights(torch.Generator().manual_seed(0))
        model.set_recompute(recompute)
        optimizer = backbone_optimizer(model, OptimizerConfig(lr=1e-4, warmup_steps=0))
        engine = initialize_engine(model.to(DEVICE), optimizer, config)
        for _ in range(2):
            engine.backward(engine(images).float().square().mean())
            step_engine(engine)
        sys.stdout.write(f"{peak_bytes() - before}\n")


def main() -> None:
    """Measure each layout, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--layout", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.layout:
        precision, stage, recompute = arguments.layout
        return measure(precision, int(stage), recompute)
    result: dict[str, object] = {}
    for precision, stage, recompute in LAYOUTS:
        command = [sys.executable, __file__, "--layout", precision, str(stage), recompute]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        measured, predicted = int(done.stdout.split()[-1]), predicted_bytes(precision, stage, recompute)
        result[f"{precision}, ZeRO {stage}, recompute {recompute}"] = {
            "measured_over_plan": measured / predicted,
            "measured_mib": measured / 2**20,
            "plan_mib": predicted / 2**20,
        }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    result |= {"device": DEVICE.type, "batch": BATCH, "commit": git_commit(), "versions": library_versions()}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
