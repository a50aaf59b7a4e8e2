"""CLIP's training beside open_clip's, and the MLCD step before and after objectives became parts.

python benchmarks/two_towers.py [--json FILE] [--only loss clip loader step] [--before COMMIT]

loss   B = 4,096, E = 512, fp32, one process: loss, embeddings' and scale's gradients, by ours and by the formula of
       open_clip's ClipLoss (both logits [B, B] under autograd; written here, on one rank its gathers do nothing).
       Times are taken in turn, the ratio is the median of rounds; memory is the peak of a process of its own above
       its embeddings.
clip   a training step by the whole trainer, DeepSpeed and the loss by blocks included, beside open_clip's model, loss
       and AdamW as its training script runs them: the same towers and batch, fp32, two threads, in turn. Needs the
       package open_clip_torch (3.3.0).
loader images/s of the training loader with labels and CLIP's tokens, over those with labels alone, in turn.
step   whole trainings of the demo's recipe on one shard by this tree and by the one of COMMIT, in turn: the median
       of a step's time but for waiting for data, and of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import loader
import torch
import torch.distributed as dist
import torch.nn.functional as F
from head import peak_memory
from report import report
from torch import Tensor

from mlcd_ds.config import parse_recipe
from mlcd_ds.data.fields import Tokens
from mlcd_ds.data.loader import Batch
from mlcd_ds.data.tokenizers import clip_tokenizer
from mlcd_ds.distributed.collectives import Group
from mlcd_ds.engine.engine_config import resolve_ds_config
from mlcd_ds.engine.layout import Layout, plan_batches
from mlcd_ds.engine.trainer import Trainer
from mlcd_ds.engine.training_data import open_training_data
from mlcd_ds.kernels.matmul import Matmul
from mlcd_ds.objectives.clip import clip_loss
from mlcd_ds.objectives.pairs import Pairs

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("loss", "clip", "loader", "step")
BEFORE = "ab08c82"  # the last tree whose trainer named the head
BATCH, DIM, SCALE = 4096, 512, 50.0
ROUNDS, STEP_ROUNDS, STEPS, WARM = 7, 5, 60, 10
CLIP_BATCH, CLIP_ROUNDS, LOADER_ROUNDS = 32, 9, 7
IMAGE = dict(image_size=224, patch_size=32, width=384, depth=12, heads=6, mlp_width=1536)
TEXT = dict(width=256, depth=12, heads=4, mlp_width=1024)  # CLIP's vocabulary and context
THREADS = {"OMP_NUM_THREADS": "2"}


def embeddings() -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows that are partly like their partners, and a scale."""
    generator = torch.Generator().manual_seed(0)
    image_BE, noise_BE = (torch.randn(BATCH, DIM, generator=generator) for _ in range(2))
    return F.normalize(image_BE), F.normalize(image_BE + 2 * noise_BE), torch.tensor(SCALE)


def ours(image_BE: Tensor, text_BE: Tensor, scale: Tensor) -> Tensor:
    pairs = Pairs(image_BE, text_BE, scale, Group(dist.group.WORLD), Matmul(False, "cpu"))
    return clip_loss(pairs)[1]["image"]


def open_clips(image_BE: Tensor, text_BE: Tensor, scale: Tensor) -> Tensor:
    """The formula of its ClipLoss."""
    image_BE, text_BE, scale = (tensor.detach().requires_grad_() for tensor in (image_BE, text_BE, scale))
    own_B = torch.arange(len(image_BE))
    by_image, by_text = scale * image_BE @ text_BE.T, scale * text_BE @ image_BE.T
    loss = (F.cross_entropy(by_image, own_B) + F.cross_entropy(by_text, own_B)) / 2
    loss.backward()
    assert image_BE.grad is not None
    return image_BE.grad


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"ours": ours, "open_clip": open_clips}


def child(name: str) -> None:
    """In a process of its own: the peak of one form, or the times of both."""
    if name == "clip":
        sys.stdout.write("\n" + json.dumps(clip_steps()) + "\n")
        return
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    given, result = embeddings(), {}
    if name == "times":
        grads = {form: call(*given) for form, call in FORMS.items()}
        result["difference"] = float((grads["ours"] - grads["open_clip"]).norm() / grads["open_clip"].norm())
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        for _ in range(ROUNDS):
            for form, call in FORMS.items():
                begin = time.perf_counter()
                call(*given)
                times[form].append(time.perf_counter() - begin)
        result |= {f"{form}_s": statistics.median(values) for form, values in times.items()}
        ratios = [mine / theirs for mine, theirs in zip(times["ours"], times["open_clip"], strict=True)]
        result["ratio"] = statistics.median(ratios)
    else:
        FORMS[name](*(tensor[:64] if tensor.ndim else tensor for tensor in given))  # libraries take theirs once
        with peak_memory(result):
            FORMS[name](*given)
    sys.stdout.write(json.dumps(result) + "\n")


def measure_loss() -> dict[str, float]:
    """Both forms' times and peaks, and their ratios."""

    def ask(name: str) -> dict[str, float]:
        command = [sys.executable, __file__, "--child", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment(ROOT))
        return json.loads(done.stdout.splitlines()[-1])

    times, peaks = ask("times"), {form: ask(form)["peak_mib"] for form in FORMS}
    return {
        "loss_memory_ratio_vs_open_clip": peaks["ours"] / peaks["open_clip"],
        "loss_time_ratio_vs_open_clip": times.pop("ratio"),
        **{f"loss_peak_mib_{form}": peak for form, peak in peaks.items()},
        **{f"loss_{name}": value for name, value in times.items()},
    }


def measure_clip() -> dict[str, float]:
    """Both steps, in turn, in a process of its own."""
    command = [sys.executable, __file__, "--child", "clip"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**environment(ROOT), **THREADS})
    return json.loads(done.stdout.splitlines()[-1])


def clip_steps() -> dict[str, float]:
    """Seconds of a step of both, and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        step_ours = our_step(Path(name))
        step_theirs = open_clips_step()
        forms, times = {"ours": step_ours, "open_clip": step_theirs}, {"ours": [], "open_clip": []}
        for number in range(CLIP_ROUNDS + 2):
            for form, step in forms.items():
                begin = time.perf_counter()
                step(number)
                if number >= 2:
                    times[form].append(time.perf_counter() - begin)
    ratios = [mine / other for mine, other in zip(times["ours"], times["open_clip"], strict=True)]
    return {
        "step_time_ratio_vs_open_clip": statistics.median(ratios),
        "step_time_ratio_vs_open_clip_lowest": min(ratios),
        "step_time_ratio_vs_open_clip_highest": max(ratios),
        **{f"clip_step_s_{form}": statistics.median(values) for form, values in times.items()},
    }


def our_step(folder: Path) -> Callable[[int], object]:
    """A step of the trainer on batches that are there already."""
    stage(ROOT, "index", "--shards", ROOT / "demo/shards/train/00000.tar", "--out", folder / "index")
    content = {
        "description": "the benchmark's towers",
        "model": IMAGE | {"embed_dim": DIM, "activation": "gelu"},
        "text": TEXT | {"embed_dim": DIM, "activation": "gelu"},
        "objective": {"name": "clip"},
        "data": {"index": str(folder / "index"), "num_streams": 1},
        "optimizer": {"lr": 5e-4, "warmup_steps": 1, "clip_norm": 1.0},
        "train": {"steps": 100, "global_batch": CLIP_BATCH, "precision": "fp32", "out": str(folder / "run")},
    }
    recipe = parse_recipe(content, "benchmark")
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group, layout, path = Group(dist.group.WORLD), Layout(1, 1, 0), Path("benchmark")
    ds_config = resolve_ds_config({}, path, recipe, layout, plan_batches(recipe, layout, 0))
    trainer = Trainer(recipe, ds_config, layout, open_training_data(recipe), group, torch.device("cpu"))
    images_B3SS, tokens_BL = clip_batch()
    numbers_B = torch.arange(CLIP_BATCH)
    batch = Batch(images_B3SS, {"tokens": tokens_BL}, numbers_B, numbers_B)
    return lambda number: float(trainer.step(number, iter([batch])).loss)


def open_clips_step() -> Callable[[int], object]:
    """A step as open_clip's training script makes it."""
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP

    vision = {"image_size": IMAGE["image_size"], "patch_size": IMAGE["patch_size"], "layers": IMAGE["depth"]}
    vision |= {"width": IMAGE["width"], "head_width": IMAGE["width"] // IMAGE["heads"]}
    text = {"width": TEXT["width"], "heads": TEXT["heads"], "layers": TEXT["depth"]}
    model, loss = CLIP(DIM, vision, text, output_dict=True), ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    images_B3SS, tokens_BL = clip_batch()

    def step(number: int) -> float:
        optimizer.zero_grad()
        total = loss(**model(images_B3SS, tokens_BL.long()))
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return float(total)

    return step


def clip_batch() -> tuple[Tensor, Tensor]:
    """Images [B, 3, S, S] and tokens [B, L] as CLIP's tokenizer gives them."""
    generator = torch.Generator().manual_seed(0)
    size = IMAGE["image_size"]
    texts = clip_tokenizer().encode([f"a drawing of {number} red hearts" for number in range(CLIP_BATCH)], 77)
    return torch.randn(CLIP_BATCH, 3, size, size, generator=generator), torch.from_numpy(texts)


def measure_loader() -> dict[str, object]:
    """Rounds of an epoch each, in turn."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        shards = Path(name) / "shards"
        shards.mkdir()
        loader.make_shards(shards)
        index, labels = loader.label_shards(shards, Path(name))
        tokens = Tokens(index, clip_tokenizer(), 77, "whole")
        rounds = []
        for _ in range(LOADER_ROUNDS):
            without = loader.images_per_s(loader.ours(index, labels))
            rounds.append((loader.images_per_s(loader.ours(index, labels, tokens=tokens)), without))
    ratios = [with_ / without for with_, without in rounds]
    return {
        "loader_ratio_with_captions": statistics.median(ratios),
        "loader_ratio_with_captions_rounds": ratios,
    }


def environment(tree: Path) -> dict[str, str]:
    """One thread, and the package of a tree."""
    return {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def stage(tree: Path, *words: object) -> None:
    """Run a command of a tree's package, from there: python -m looks in the working directory first."""
    command = [sys.executable, "-m", "mlcd_ds", *map(str, words)]
    done = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr}")


def step_seconds(tree: Path, folder: Path, out: Path) -> float:
    """The median of a training's steps, but for waiting for data."""
    keys = [f"data.index={folder / 'index'}", f"data.labels={folder / 'labels'}", "data.clusters=null"]
    keys += ["head.init=normal", "train.log_every=1", f"train.steps={STEPS}", "optimizer.warmup_steps=2"]
    keys += ["train.precision=fp32", f"train.out={out}"]
    stage(tree, "train", "--deepspeed_config", ROOT / "ds_configs/zero1_fp32_cpu.json", *keys)
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(entry["time/step_s"] - entry["time/data_s"] for entry in entries[WARM:])


def measure_step(before: str) -> dict[str, float | str]:
    """Both trees' steps, in turn."""
    with tempfile.TemporaryDirectory() as name:
        folder, old = Path(name), Path(name) / "before"
        old.mkdir()
        archive = subprocess.run(["git", "archive", before], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        subprocess.run(["tar", "-x", "-C", str(old)], input=archive, check=True)
        for tree in (old, ROOT):
            found = subprocess.check_output([sys.executable, "-c", "import mlcd_ds; print(mlcd_ds.__file__)"], cwd=tree)
            assert Path(found.decode().strip()).is_relative_to(tree), "the package of another tree"
        shard = ROOT / "demo/shards/train/00000.tar"
        index, embeddings_, clusters = (folder / name for name in ("index", "embeddings", "clusters"))
        stage(ROOT, "index", "--shards", shard, "--out", index)
        stage(ROOT, "embed", "--index", index, "--encoder", "pixels@8", "--out", embeddings_)
        stage(ROOT, "cluster", "--embeddings", embeddings_, "--num-centers", 64, "--out", clusters)
        stage(ROOT, "assign", "--embeddings", embeddings_, "--clusters", clusters, "--out", folder / "labels")
        pairs = []
        for number in range(STEP_ROUNDS):
            trees = ((old, "before"), (ROOT, "after"))[:: 1 if number % 2 else -1]  # the machine drifts
            found = {which: step_seconds(tree, folder, folder / f"{which}{number}") for tree, which in trees}
            pairs.append(found)
            sys.stdout.write(f"{json.dumps(found)}\n")
            sys.stdout.flush()
    return {
        "mlcd_step_ratio_before_after": statistics.median(pair["after"] / pair["before"] for pair in pairs),
        "mlcd_step_ratio_lowest": min(pair["after"] / pair["before"] for pair in pairs),
        "mlcd_step_ratio_highest": max(pair["after"] / pair["before"] for pair in pairs),
        "mlcd_step_s_before": statistics.median(pair["before"] for pair in pairs),
        "mlcd_step_s_after": statistics.median(pair["after"] for pair in pairs),
        "mlcd_step_before": before,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--before", default=BEFORE, metavar="COMMIT", help="default: %(default)s")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child)
    result: dict[str, object] = {}
    if "loss" in arguments.only:
        result |= measure_loss()
    if "clip" in arguments.only:
        result |= measure_clip()
    if "loader" in arguments.only:
        result |= measure_loader()
    if "step" in arguments.only:
        result |= measure_step(arguments.before)
    report(result, arguments.json)
    return None


if __name__ == "__main__":
    main()
