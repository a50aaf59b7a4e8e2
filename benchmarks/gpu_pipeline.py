"""The parts of gpu.py that need data: pixels, loader, the trainer, the demo."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median

import loader as loader_benchmark
import numpy as np
import torch
from gpu_kernels import DEVICE, DS_CONFIG, HEAD, IS_GPU, PRECISION, PRODUCT, ROOT, VIT_BATCH, VIT_OVERRIDES, alone
from torch import Tensor

from mlcd_ds.artefacts.files import record_of
from mlcd_ds.artefacts.manifest import write_manifest
from mlcd_ds.config import load_recipe
from mlcd_ds.data import reference
from mlcd_ds.data.dali import EncodedBatch, EvaluationDecoder, ImageDecoder, WholeImages
from mlcd_ds.data.fields import Labels, TrainingData
from mlcd_ds.data.label_store import LabelManifest, LabelStore
from mlcd_ds.data.loader import AugmentConfig, StreamSlice, TrainLoader
from mlcd_ds.data.order import SampleOrder
from mlcd_ds.data.pixels import clip_pixels
from mlcd_ds.data.shard_index import ShardIndex
from mlcd_ds.distributed.ds_config import read_ds_config
from mlcd_ds.engine.engine_config import read_layout, resolve_ds_config
from mlcd_ds.engine.layout import plan_batches
from mlcd_ds.engine.trainer import Trainer
from mlcd_ds.engine.training_data import open_training_data


def step_waits() -> dict[str, int]:
    """Places in Python where the host waits in three steps of the whole trainer, and how often."""
    path = ROOT / DS_CONFIG
    config = read_ds_config(path)
    fixed = ("optimizer.warmup_steps=1", "train.global_batch=64", f"train.precision={PRECISION}")
    with shards(num_centers=20_000) as (folder, _, labels), alone() as group:
        changed = (f"data.index={folder / 'index'}", f"data.labels={labels}", "data.clusters=null", "head.init=normal")
        recipe = load_recipe("demo", (*fixed, *changed))
        layout = read_layout(config, path, 1)
        plan = plan_batches(recipe, layout, 0)
        ds_config = resolve_ds_config(config, path, recipe, layout, plan)
        trainer = Trainer(recipe, ds_config, layout, open_training_data(recipe), group, DEVICE)
        batches = trainer.batches(0)
        for step in range(3):
            trainer.step(step, batches)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told_waits:
                warnings.simplefilter("always")
                for step in range(3, 6):
                    trainer.step(step, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            batches.close()
    places = [
        f"{'/'.join(Path(w.filename).parts[-3:])}:{w.lineno}" for w in told_waits if "synchroniz" in str(w.message)
    ]
    return dict(Counter(places))


def demo_pictures(count: int) -> tuple[list[bytes], np.ndarray]:
    """JPEGs of the demo, and their heights and widths."""
    images = [content for _, content, _ in islice(loader_benchmark.source_pictures(), count)]
    return images, np.array([reference.decode(image).shape[:2] for image in images])


def behind_queued_work(decoder: ImageDecoder, batches: list[EncodedBatch]) -> float:
    """Largest difference between batches taken while the GPU is busy and the same ones taken in peace."""
    busy = torch.randn(PRODUCT, PRODUCT, device=DEVICE)
    taken: list[list[Tensor]] = []
    for is_busy in (False, True):
        taken.append([])
        for batch in batches:
            decoder.push(batch)
            if is_busy:
                for _ in range(20):
                    busy = busy @ busy * 1e-3
            taken[-1].append(decoder.pop())
            if not is_busy:
                taken[-1][-1] = taken[-1][-1].cpu()
    return max(float((hurried.cpu() - calm).abs().max()) for calm, hurried in zip(*taken, strict=True))


def pixels() -> dict[str, object]:
    """Mean and largest difference from the plain loader, in grey levels of 255."""
    count = 256
    images, sizes_B2 = demo_pictures(count)
    form = clip_pixels(112)
    generator = np.random.default_rng(0)
    sides_B2 = np.maximum((sizes_B2 * generator.uniform(0.6, 1.0, (count, 2))).astype(int), 1)
    corners_B2 = (generator.random((count, 2)) * (sizes_B2 - sides_B2 + 1)).astype(int)
    flips_B = generator.integers(0, 2, count).astype(np.int32)
    batch = EncodedBatch(images, np.concatenate([corners_B2, sides_B2], axis=1).astype(np.int32), flips_B)
    whole = WholeImages(images, sizes_B2)
    training, evaluation = (kind(count, form, DEVICE, 4) for kind in (ImageDecoder, EvaluationDecoder))
    training.push(batch)
    evaluation.push(whole)
    std = torch.tensor(form.std)[:, None, None]
    unflipped = EncodedBatch(images, batch.boxes_B4, 1 - flips_B)
    pairs = {
        "training": (training.pop(), reference.load(batch, form)),
        "evaluation": (evaluation.pop(), reference.load_whole(whole, form)),
    }
    pairs["training, twin mirrored"] = (pairs["training"][0], reference.load(unflipped, form))
    turned = [
        EncodedBatch(images[n:] + images[:n], *(np.roll(a, -n, 0) for a in (batch.boxes_B4, flips_B))) for n in range(6)
    ]
    result: dict[str, object] = {"largest difference behind queued work": behind_queued_work(training, turned)}
    for name, (got, wanted) in pairs.items():
        differences = ((got.cpu() - wanted) * std).abs()
        result[name] = {
            "mean": float(differences.mean()),
            "of_worst_image": float(differences.flatten(1).mean(dim=1).max()),
        }
    return result


@contextlib.contextmanager
def shards(num_labels: int = 8, num_centers: int = HEAD.classes) -> Iterator[tuple[Path, ShardIndex, Path]]:
    """A folder, an index of JPEGs of 384 px in it, and random labels."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        loader_benchmark.make_shards(folder / "shards")
        mlcd("index", "--shards", f"{folder}/shards/*.tar", "--out", folder / "index")
        index, labels = ShardIndex(folder / "index"), folder / "labels"
        labels.mkdir()
        files, generator = {}, np.random.default_rng(0)
        for entry in index.shards:
            path = labels / f"{entry.name}.npy"
            np.save(path, generator.integers(0, num_centers, (entry.num_images, num_labels), dtype=np.int32))
            files[path.name] = record_of(path)
        np.save(labels / "sizes.npy", np.zeros(num_centers, np.int64))
        files["sizes.npy"] = record_of(labels / "sizes.npy")
        manifest = LabelManifest(
            stage="assign",
            parameters={},
            inputs={"index": index.manifest.fingerprint, "clusters": "none"},
            files=files,
            versions={},
            num_images=index.num_images,
            num_labels=num_labels,
            num_centers=num_centers,
        )
        write_manifest(labels, manifest)
        yield folder, index, labels


def mlcd(*words: object) -> str:
    """Run a stage as a user would; what it said."""
    command = [sys.executable, "-m", "mlcd_ds", *map(str, words)]
    return told(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False))


def told(done: subprocess.CompletedProcess[str]) -> str:
    """A command's output; an error with the end of it where it failed."""
    said = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {said[-1500:]}")
    return said


def loader() -> dict[str, object]:
    """Images/s after the first two batches."""
    batch, form = (256, clip_pixels(224)) if IS_GPU else (16, clip_pixels(64))
    threads = min(8, os.cpu_count() or 1)
    result: dict[str, object] = {"threads": threads}
    with shards() as (_, index, labels):
        data = TrainingData(index, {"labels": Labels(LabelStore(labels, index))})
        order = SampleOrder(index.counts, 1, 512, 0)
        images, plain = StreamSlice((0,), batch, 1), AugmentConfig()
        training = TrainLoader(data, order, images, form, plain, DEVICE, threads)
        batches = training.batches(0)
        result["training_images_per_s"] = throughput(batches, batch)
        batches.close()
        training.close()
        jitter = AugmentConfig(color_jitter=0.4, hue_jitter=36)
        coloured = TrainLoader(data, order, images, form, jitter, DEVICE, threads)
        batches = coloured.batches(0)
        result["training_images_per_s_with_colours"] = throughput(batches, batch)
        batches.close()
        coloured.close()
    return result


def throughput(batches: Iterator[object], batch: int) -> float:
    """Images/s over 16 batches."""
    count = 16 if IS_GPU else 2
    for _ in range(2):
        next(batches)
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    if IS_GPU:
        torch.cuda.synchronize()
    return count * batch / (time.perf_counter() - began)


VARIANTS: dict[str, tuple[str, ...]] = {
    "as it is": (),
    "compiled": ("train.compile=true",),
    "half of the patches": ("train.token_drop=0.5",),
}
SPEEDS = ("speed/images_per_s", "speed/mfu", "speed/data_wait_share", "loss/total")


def training() -> dict[str, object]:
    """The recipe on one GPU with a batch that it holds, through the command line."""
    steps = 24 if IS_GPU else 4
    with shards() as (folder, _, labels):
        sizes = (f"train.global_batch={VIT_BATCH}", "train.micro_batch_per_rank=null", "data.num_streams=1")
        sizes += (*VIT_OVERRIDES, f"train.precision={PRECISION}", "optimizer.warmup_steps=1")
        data = (f"data.index={folder / 'index'}", f"data.labels={labels}", "data.num_threads=8")
        often = (f"train.steps={steps}", "train.log_every=4", "train.checkpoint_every=1000")
        command = ("train", "--recipe", "vit_l_14", "--deepspeed_config", DS_CONFIG, *sizes, *data, *often)
        result: dict[str, object] = {}
        for name, variant in VARIANTS.items():
            run = folder / name.replace(" ", "_")
            mlcd(*command, *variant, f"train.out={run}")
            entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            late = entries[len(entries) // 2 :]
            result[name] = {key: median(entry[key] for entry in late) for key in SPEEDS if key in late[0]}
            result[name] |= {key: value for key, value in late[-1].items() if key.startswith(("time/", "memory/"))}
            shutil.rmtree(run)  # its checkpoint has 16 GB
        plan = ("plan", "--recipe", "vit_l_14", "--gpus", 1, "--gpu", "h100", "--num-centers", HEAD.classes)
        planned = mlcd(*plan, "--deepspeed_config", DS_CONFIG, *sizes)
        parts = re.findall(r"^  (\D+?) +([\d.]+)(?: of .*)?$", planned, re.MULTILINE)
        result["plan_gib"] = {name: float(size) for name, size in parts}
    return result


def demo() -> dict[str, object]:
    """The report of the demo's pipeline, its minutes, what it said of its devices, and its training gone on with."""
    began = time.monotonic()
    short = () if IS_GPU else ("train.steps=4", "optimizer.warmup_steps=1", "train.checkpoint_every=2")
    command = [sys.executable, "demo/run.py", "--out", "runs/gpu_demo", *short]
    said = told(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False))
    result: dict[str, object] = {"minutes": (time.monotonic() - began) / 60}
    result["said"] = [line for line in said.splitlines() if re.search(r"faiss|triton|torch,|cuda|GPU", line)][:12]
    result["report"] = json.loads((ROOT / "runs/gpu_demo/report.json").read_text())
    run = ROOT / "runs/gpu_demo/train"
    before = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    shutil.rmtree(sorted((run / "checkpoints").glob("step_*"))[-1])  # as if it had been killed before its last one
    (run / "manifest.json").unlink()
    again = told(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False))
    after = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    result["went on"] = [line for line in again.splitlines() if "resum" in line or "goes on" in line][:3]
    result["last loss, and after going on"] = [before["loss/total"], after["loss/total"]]
    return result
