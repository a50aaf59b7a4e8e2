"""The backbone's training step: against `transformers`, with dropped tokens, and inside the whole engine.

  python benchmarks/backbone.py [--json FILE]

Forward, backward and AdamW of the same shape on the same machine, in turn in one run; ratios are medians over rounds.

  step_time_ratio_vs_fastest_peer   ours over transformers' CLIPVisionModel (its attention: sdpa, and eager), and over
                                    open_clip's and timm's ViT where they are installed (both need torchvision)
  token_drop_speedup                without over with half of the patches dropped
  engine_overhead                   (step with DeepSpeed, head and loader) / (bare forward, backward and AdamW) - 1
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from mlcd_ds.artefacts.manifest import library_versions
from mlcd_ds.config import load_recipe
from mlcd_ds.engine.checkpoint import git_commit
from mlcd_ds.models.convert import vision_config
from mlcd_ds.models.noise import TrainingNoise
from mlcd_ds.models.vit import ViT, ViTConfig

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
BATCH = 256 if DEVICE.type == "cuda" else 8
ROUNDS, WARMUP = 7, 2
PAIRS = 5  # of a training in the engine and bare steps
VIT = ViTConfig(
    image_size=224, patch_size=16, width=384, depth=12, heads=6, mlp_width=1536, embed_dim=512, activation="quick_gelu"
)


def training_step(model: nn.Module, run: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Forward, backward and a fused AdamW over `run`'s features."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        run().float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(work: Callable[[], None]) -> float:
    """How long it takes, with the device idle before and after."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turn(steps: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Seconds of each, `ROUNDS` times in turn."""
    for step in steps.values():
        for _ in range(WARMUP):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            times[name].append(seconds(step))
    return times


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    """Median over the rounds."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def installed_peers() -> dict[str, nn.Module]:
    """ViTs of the same shape, from images to one embedding, of the libraries that are installed."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    class Pooled(nn.Module):
        def __init__(self, attention: str) -> None:
            super().__init__()
            self.model = CLIPVisionModel(CLIPVisionConfig(**vision_config(VIT), attn_implementation=attention))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.model(images).pooler_output

    found: dict[str, nn.Module] = {f"transformers_{attention}": Pooled(attention) for attention in ("sdpa", "eager")}
    mlp_ratio = VIT.mlp_width / VIT.width
    if importlib.util.find_spec("open_clip"):
        from open_clip.transformer import QuickGELU, VisionTransformer

        shape = (VIT.image_size, VIT.patch_size, VIT.width, VIT.depth, VIT.heads, mlp_ratio)
        found["open_clip"] = VisionTransformer(*shape, output_dim=VIT.embed_dim, act_layer=QuickGELU)
    if importlib.util.find_spec("timm"):
        from timm.models.vision_transformer import VisionTransformer as TimmViT

        shape = dict(img_size=VIT.image_size, patch_size=VIT.patch_size, embed_dim=VIT.width, depth=VIT.depth)
        shape |= dict(num_heads=VIT.heads, mlp_ratio=mlp_ratio, num_classes=0, pre_norm=True)
        found["timm"] = TimmViT(**shape, act_layer="quick_gelu")
    return found


def peers() -> dict[str, float]:
    """Ours, ours with half of the patches, and the others'."""
    images = torch.randn(BATCH, 3, VIT.image_size, VIT.image_size, device=DEVICE, dtype=DTYPE)
    keys = torch.arange(BATCH, device=DEVICE)

    def ours() -> ViT:
        model = ViT(VIT)
        model.init_weights(torch.Generator().manual_seed(0))
        return model.to(DEVICE, DTYPE)

    whole, dropping = ours(), ours()
    steps = {
        "ours": training_step(whole, lambda: whole.forward_features(images)),
        "ours_half": training_step(dropping, lambda: dropping.forward_features(images, TrainingNoise(keys, 0.0, 0.5))),
    }
    others = {name: model.to(DEVICE, DTYPE) for name, model in installed_peers().items()}
    steps |= {name: training_step(model, lambda m=model: m(images)) for name, model in others.items()}
    times = in_turn(steps)
    against = {name: ratio(times, "ours", name) for name in others}
    return {
        "step_time_ratio_vs_fastest_peer": max(against.values()),
        **{f"step_time_ratio_vs_{name}": value for name, value in against.items()},
        "token_drop_speedup": ratio(times, "ours", "ours_half"),
    }


def engine_overhead(*overrides: str) -> float:
    """The whole training of the demo's data on one rank, over the bare steps of its backbone, minus 1.

    Without its checkpoints.
    """
    fixed = ("train.precision=fp32", "train.checkpoint_every=1000", "optimizer.warmup_steps=1")
    recipe = load_recipe("demo", (*overrides, *fixed))
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "mlcd_ds", "train", "--deepspeed_config", "ds_configs/zero1_fp32_cpu.json"]
        command += [*overrides, *fixed, f"train.out={out}/run"]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
        entries = [json.loads(line) for line in Path(out, "run/metrics.jsonl").read_text().splitlines()]
    engine_s = recipe.train.global_batch / statistics.median(entry["speed/images_per_s"] for entry in entries[1:])
    torch.set_num_threads(1)
    model = ViT(recipe.model)
    model.init_weights(torch.Generator().manual_seed(0))
    batch, size = recipe.train.global_batch, recipe.model.image_size
    images, keys = torch.randn(batch, 3, size, size), torch.arange(batch)
    noise = TrainingNoise(keys, recipe.train.drop_path, recipe.train.token_drop)
    times = in_turn({"bare": training_step(model, lambda: model(images, noise))})
    return engine_s / statistics.median(times["bare"]) - 1


def median_of_pairs(*overrides: str) -> float:
    """The two are minutes apart: one pair alone was seen to be 0.06 off on a quiet machine."""
    return statistics.median(engine_overhead(*overrides) for _ in range(PAIRS))


def engine() -> dict[str, float]:
    """On the backbone of the other figures, and on the demo's tiny one, where fixed costs weigh most.

    Needs the demo's index, clusters and labels (`make demo`, or its first stages).
    """
    if not (ROOT / "runs/demo/labels/manifest.json").exists():
        return {}
    shape = VIT.model_dump(include={"image_size", "patch_size", "width", "depth", "heads", "mlp_width", "embed_dim"})
    model = [f"model.{key}={value}" for key, value in shape.items()]
    small = ("train.steps=12", "train.global_batch=16", "train.log_every=2", "train.token_drop=0")
    return {
        "engine_overhead": median_of_pairs(*model, *small),
        "engine_overhead_demo": median_of_pairs("train.steps=30", "train.log_every=5"),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    result: dict[str, object] = {**peers(), **engine()}
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    result |= {"device": DEVICE.type, "batch": BATCH, "commit": git_commit(), "versions": library_versions()}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
