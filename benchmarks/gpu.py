"""What only a GPU can show: one script for one GPU that checks and times everything, in minutes.

  python benchmarks/gpu.py [--json FILE] [--only NAME ...]

A part that fails says so in its figures, the others go on, and the script ends with status 1. Times are medians over
rounds with the device idle before and after; `of_peak` is over the product of two 8192 x 8192 bf16 matrices on the
same GPU in the same run, `of_sheet` over the vendor's dense bf16 figure.

  ceilings      a copy on the device, and that product
  kernels       head (loss and both gradients) and nearest centres by Triton and by torch, in fp32 and bf16, against
                float64; a twin with a wrong margin or wrong centres must be found out
  head          B = 32,768, D = 768, a million classes, r = .1: a step, its passes, memory above the state, and the same
                beside the bare products and beside one softmax over stored logits (a batch that fits)
  host_waits    a step of the head and its optimizer with every host wait an error; a twin with one must be found out
  step_waits    where the host waits in a step of the whole trainer, DeepSpeed's optimizer included
  assign        65,536 rows, D = 768, to a million centres: 1 and 8 nearest, Triton and torch
  lloyd         an iteration of k-means over rows in host memory: beside its bare search
  backbone      ViT-L/14 at 224: forward, backward and AdamW, alone, beside transformers and timm where installed
  pixels        DALI on the GPU against the plain loader
  loader        images/s of the training loader and the evaluation loader, JPEGs of 384 px to 224
  training      `mlcd train --recipe vit_l_14` with a million centres, as users start it: images/s, MFU, waits, memory
                beside `mlcd plan`
  demo          the whole pipeline of `make demo`; then its training goes on from the last checkpoint but one
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median

import head as head_benchmark
import loader as loader_benchmark
import numpy as np
import torch
import torch.nn.functional as F
from head_references import MARGIN, SCALE
from torch import Tensor, nn

from mlcd_ds.artefacts.files import record_of
from mlcd_ds.artefacts.manifest import library_versions, write_manifest
from mlcd_ds.clustering.blockwise import BlockwiseAssigner
from mlcd_ds.clustering.choose_assigner import choose_assigner
from mlcd_ds.clustering.kmeans import lloyd_step
from mlcd_ds.clustering.row_sampling import Sample
from mlcd_ds.config import load_recipe
from mlcd_ds.data import reference
from mlcd_ds.data.dali import EncodedBatch, EvaluationDecoder, ImageDecoder, WholeImages
from mlcd_ds.data.fields import Labels
from mlcd_ds.data.label_store import LabelManifest, LabelStore
from mlcd_ds.data.loader import AugmentConfig, StreamSlice, TrainLoader
from mlcd_ds.data.order import SampleOrder
from mlcd_ds.data.pixels import clip_pixels
from mlcd_ds.data.shard_index import ShardIndex
from mlcd_ds.distributed.ds_config import read_ds_config
from mlcd_ds.distributed.launch import detect_launch, process_group
from mlcd_ds.engine.checkpoint import git_commit
from mlcd_ds.engine.engine_config import read_layout, resolve_ds_config
from mlcd_ds.engine.hardware import peak_tflops
from mlcd_ds.engine.layout import plan_batches
from mlcd_ds.engine.trainer import Trainer
from mlcd_ds.engine.training_data import open_training_data
from mlcd_ds.models.convert import vision_config
from mlcd_ds.models.noise import TrainingNoise
from mlcd_ds.models.vit import ViT, flops_per_image

ROOT = Path(__file__).resolve().parents[1]
DEVICE = head_benchmark.DEVICE
IS_GPU = DEVICE.type == "cuda"
ROUNDS = 7 if IS_GPU else 1
GIB = 2**30
# Off a GPU the parts run at sizes that only show that they work.
HEAD = head_benchmark.Sizes(32_768, 768, 1_000_000, 0.1) if IS_GPU else head_benchmark.Sizes(64, 64, 2_000, 0.1)
ROWS, CENTERS, DIM = (65_536, 1_000_000, 768) if IS_GPU else (512, 3_000, 64)
LLOYD_ROWS, LLOYD_CENTERS = (524_288, 100_000) if IS_GPU else (2_048, 500)
PRODUCT = 8192 if IS_GPU else 256
VIT_OVERRIDES = () if IS_GPU else ("model.width=64", "model.depth=2", "model.heads=2", "model.mlp_width=128")
VIT_BATCH = 128 if IS_GPU else 2
KERNELS = ("torch", "triton") if IS_GPU else ("torch",)
PRECISION = "bf16" if IS_GPU else "fp32"
DS_CONFIG = "ds_configs/zero1_bf16.json" if IS_GPU else "ds_configs/zero1_fp32_cpu.json"
found: dict[str, float] = {}  # ceilings of this run


def seconds(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median over rounds, after one to warm up."""
    work()
    return median(head_benchmark.seconds(work) for _ in range(rounds))


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """By the Frobenius norm."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def rates(flops: float, time_s: float) -> dict[str, float]:
    """Seconds, TFLOP/s, and what part of the ceilings that is."""
    tflops, sheet = flops / time_s / 1e12, peak_tflops(DEVICE)
    figures = {"seconds": time_s, "tflops": tflops}
    if "product_tflops" in found:
        figures["of_peak"] = tflops / found["product_tflops"]
    return figures | ({"of_sheet": tflops / sheet} if sheet else {})


def ceilings() -> dict[str, float]:
    """Bytes read and written in a copy of 2 GiB, and a product of random matrices."""
    source = torch.randn(2**29 if IS_GPU else 2**20, device=DEVICE)
    target = torch.empty_like(source)
    copy_s = seconds(lambda: target.copy_(source))
    left, right = (torch.randn(PRODUCT, PRODUCT, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product_s = seconds(lambda: left @ right)
    found["product_tflops"] = 2 * PRODUCT**3 / product_s / 1e12
    return {"copy_gb_per_s": 2 * source.nbytes / copy_s / 1e9, "product_tflops": found["product_tflops"]}


def kernels() -> dict[str, object]:
    """Errors of every kernel against float64, and whether the twins were found out."""
    with alone() as group:
        result: dict[str, object] = {"head": head_benchmark.measure_errors(group)}
    generator = torch.Generator(DEVICE).manual_seed(0)
    # Sizes that no tile divides. Centres near the rows, so that near misses are common.
    rows_BE = F.normalize(torch.randn(1_027, 200, device=DEVICE, generator=generator), dim=1)
    centers_CE = F.normalize(torch.randn(5_003, 200, device=DEVICE, generator=generator), dim=1)
    scores_BC = rows_BE.double() @ centers_CE.double().T
    best_Bk = scores_BC.topk(8, dim=1)
    for metric in ("cosine", "euclidean"):
        for kernel in KERNELS:
            for is_bf16 in (False, True):
                assigner = choose_assigner(kernel, metric, DEVICE, is_bf16)
                assigner.set_centers(centers_CE)
                scores_Bk, nearest_Bk = assigner.search(rows_BE, 8)
                if metric == "euclidean":
                    scores_Bk = scores_Bk + centers_CE.square().sum(dim=1)[nearest_Bk] / 2
                result[f"nearest {metric}, {kernel}, {'bf16' if is_bf16 else 'fp32'}"] = {
                    "same_nearest": float((nearest_Bk[:, 0] == best_Bk.indices[:, 0]).double().mean()),
                    "same_8": float(
                        (nearest_Bk.sort(dim=1).values == best_Bk.indices.sort(dim=1).values).double().mean()
                    ),
                    "score_error": relative_error(scores_Bk, scores_BC.gather(1, nearest_Bk)),
                    "score_lost": float((best_Bk.values[:, 0] - scores_BC.gather(1, nearest_Bk[:, :1])[:, 0]).max()),
                }
    assigner = choose_assigner(KERNELS[-1], "cosine", DEVICE, True)
    assigner.set_centers(centers_CE.roll(1, dims=0))
    twin = float((assigner.search(rows_BE, 1)[1][:, 0] == best_Bk.indices[:, 0]).double().mean())
    return {**result, "same_nearest_twin": twin}


def agreement(got_Bk: Tensor, wanted_Bk: Tensor) -> dict[str, float]:
    """Shares of rows with the same nearest, and of the same k nearest."""
    is_same_Bk = got_Bk.sort(dim=1).values == wanted_Bk.sort(dim=1).values
    return {
        "same_nearest": float((got_Bk[:, 0] == wanted_Bk[:, 0]).double().mean()),
        "same_k": float(is_same_Bk.all(dim=1).double().mean()),
    }


@contextlib.contextmanager
def alone() -> Iterator[head_benchmark.Group]:
    """A group of this process."""
    with process_group(detect_launch({})) as group:
        yield group


def head() -> dict[str, object]:
    """A step at the size of the paper's job on one GPU, and what it is made of."""
    flops = 8 * HEAD.batch * HEAD.classes * HEAD.rate * HEAD.dim  # four products
    result: dict[str, object] = {}
    with alone() as group:
        batch = head_benchmark.make_batch(HEAD, group)
        for kernel in KERNELS:
            ours = head_benchmark.OurHead(HEAD, group, "bf16", kernel)
            ours.step(*batch)
            memory: dict[str, float] = {}
            with head_benchmark.peak_memory(memory):
                ours.step(*batch)
            figures = rates(flops, seconds(lambda ours=ours: ours.step(*batch)))
            both_s = seconds(lambda ours=ours: ours.head(*batch))
            figures |= {"passes": rates(flops, both_s), "peak_gib_above_state": memory["peak_mib"] / 1024}
            result[kernel] = figures
            del ours
        emb_GE = torch.randn(HEAD.batch, HEAD.dim, device=DEVICE, dtype=torch.bfloat16)
        unit_SE = torch.randn(round(HEAD.classes * HEAD.rate), HEAD.dim, device=DEVICE, dtype=torch.bfloat16)
        block = 4_096 if IS_GPU else 16

        def bare() -> None:
            """The four products of a step, by blocks of images, with nothing between."""
            for begin in range(0, HEAD.batch, block):
                part = emb_GE[begin : begin + block]
                for _ in range(2):
                    logits = part @ unit_SE.T
                logits @ unit_SE
                logits.T @ part

        result["bare_products"] = rates(flops, seconds(bare))
        few = emb_GE[: HEAD.batch // 8].float().requires_grad_()
        weight_SE = unit_SE.float().requires_grad_()
        target = torch.randint(len(unit_SE), (len(few),), device=DEVICE)

        def stored() -> None:
            """One softmax over stored logits under autocast, for an eighth of the batch."""
            with torch.autocast(DEVICE.type, torch.bfloat16):
                logits = few @ weight_SE.T
            F.cross_entropy(SCALE * (logits.float() - MARGIN), target).backward()

        memory = {}
        stored()
        with head_benchmark.peak_memory(memory):
            stored()
        figures = rates(flops / 8 * 3 / 4, seconds(stored))
        result["stored_softmax_of_an_eighth"] = {**figures, "peak_gib": memory["peak_mib"] / 1024}
    return result


def host_waits() -> dict[str, object]:
    """Whether the host waits anywhere in a step of head and optimizer (an error there would end this part)."""
    sizes = head_benchmark.Sizes(512, 64, 20_000, 0.1)
    result: dict[str, object] = {}
    with alone() as group:
        batch = head_benchmark.make_batch(sizes, group)
        for kernel in KERNELS:
            ours = head_benchmark.OurHead(sizes, group, "bf16", kernel)
            for _ in range(2):
                ours.step(*batch)
            torch.cuda.set_sync_debug_mode("error")
            try:
                ours.step(*batch)
                result[kernel] = 0
            except RuntimeError as error:
                result[kernel] = f"waits: {error}: {traceback.format_exc().splitlines()[-4].strip()}"
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.set_sync_debug_mode("error")
        try:
            float(batch[0].sum())
            result["twin_found"] = False
        except RuntimeError:
            result["twin_found"] = True
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return result


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


def assign() -> dict[str, object]:
    """Nearest centres in bf16; the faster one's are compared with fp32's."""
    rows_BE = F.normalize(torch.randn(ROWS, DIM, device=DEVICE), dim=1)
    centers_CE = F.normalize(torch.randn(CENTERS, DIM, device=DEVICE), dim=1)
    result: dict[str, object] = {}
    for kernel in KERNELS:
        assigner = choose_assigner(kernel, "cosine", DEVICE, True)
        assigner.set_centers(centers_CE)
        for k in (1, 8):
            memory: dict[str, float] = {}
            with head_benchmark.peak_memory(memory):
                assigner.search(rows_BE, k)
            time_s = seconds(lambda k=k, assigner=assigner: assigner.search(rows_BE, k), 3)
            figures = rates(2 * ROWS * CENTERS * DIM, time_s)
            result[f"{kernel}, {k} nearest"] = {**figures, "peak_gib": memory["peak_mib"] / 1024}
        few_BE = rows_BE[:2_048]
        got_Bk = assigner.search(few_BE, 8)[1]
        exact = BlockwiseAssigner("cosine", False, DEVICE)
        exact.set_centers(centers_CE)
        wanted_Bk = exact.search(few_BE, 8)[1]
        result[f"{kernel}, beside fp32"] = agreement(got_Bk, wanted_Bk)
    return result


class HostRows:
    """fp16 rows in host memory, as `mlcd embed` leaves them."""

    def __init__(self, rows_NE: Tensor) -> None:
        self.rows_NE = rows_NE
        self.num_rows, self.dim = rows_NE.shape

    def blocks(self, block_rows: int, sample: Sample | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        numbers_N = torch.arange(self.num_rows)
        yield from zip(numbers_N.split(block_rows), self.rows_NE.split(block_rows), strict=True)

    def place(self, number: int) -> str:
        return f"row {number}"


def lloyd() -> dict[str, object]:
    """An iteration: reading, assigning, adding up, averaging."""
    rows = HostRows(F.normalize(torch.randn(LLOYD_ROWS, DIM, dtype=torch.float32), dim=1).half())
    centers_CE = F.normalize(torch.randn(LLOYD_CENTERS, DIM, device=DEVICE), dim=1)
    assigner = choose_assigner(KERNELS[-1], "cosine", DEVICE, True)
    with alone() as group:
        time_s = seconds(lambda: lloyd_step(rows, group, assigner, centers_CE, "cosine", None), 3)  # type: ignore[arg-type]
    on_device = rows.rows_NE[:ROWS].to(DEVICE).float()
    search_s = seconds(lambda: assigner.search(on_device, 1), 3) * LLOYD_ROWS / len(on_device)
    figures = rates(2 * LLOYD_ROWS * LLOYD_CENTERS * DIM, time_s)
    return {**figures, "rows_per_s": LLOYD_ROWS / time_s, "time_over_bare_search": time_s / search_s}


def backbone() -> dict[str, object]:
    """Training steps of the same backbone, and how much of the peak they reach."""
    config = load_recipe("vit_l_14", VIT_OVERRIDES).model
    images = torch.randn(VIT_BATCH, 3, config.image_size, config.image_size, device=DEVICE, dtype=torch.bfloat16)
    keys = torch.arange(VIT_BATCH, device=DEVICE)
    flops = 3 * VIT_BATCH * flops_per_image(config)

    def ours() -> ViT:
        model = ViT(config)
        model.init_weights(torch.Generator().manual_seed(0))
        return model.to(DEVICE, torch.bfloat16)

    def compiled() -> ViT:
        model = ours()
        for block in model.encoder.layers:
            block.compile()
        return model

    def transformers_clip() -> nn.Module:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        return CLIPVisionModel(CLIPVisionConfig(**vision_config(config))).to(DEVICE, torch.bfloat16)

    def timm_vit() -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        shape = {"img_size": config.image_size, "patch_size": config.patch_size, "embed_dim": config.width}
        shape |= {"depth": config.depth, "num_heads": config.heads, "num_classes": 0, "pre_norm": True}
        return VisionTransformer(**shape).to(DEVICE, torch.bfloat16)

    half = TrainingNoise(keys, 0.0, 0.5)
    runs: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], float]] = {
        "ours": (ours, lambda m: m.forward_features(images), 1.0),
        "ours compiled": (compiled, lambda m: m.forward_features(images), 1.0),
        "ours, half of the patches": (ours, lambda m: m.forward_features(images, half), 0.5),
        "transformers": (transformers_clip, lambda m: m(images).pooler_output, 1.0),
        "timm": (timm_vit, lambda m: m(images), 1.0),
    }
    result: dict[str, object] = {}
    for name, (make, run, share) in runs.items():
        try:
            model = make()
        except ImportError:
            continue
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step(model: nn.Module = model, run: Callable = run, optimizer: torch.optim.AdamW = optimizer) -> None:
            run(model).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        memory: dict[str, float] = {}
        step()
        with head_benchmark.peak_memory(memory):
            step()
        time_s = seconds(step, 5 if IS_GPU else 1)
        result[name] = {**rates(flops * share, time_s), "images_per_s": VIT_BATCH / time_s}
        result[name]["peak_gib_above_state"] = memory["peak_mib"] / 1024
        del model, optimizer, step
        release()
    return result


def release() -> None:
    """Give back what torch's allocator keeps."""
    if IS_GPU:
        torch.cuda.empty_cache()


def demo_pictures(count: int) -> tuple[list[bytes], np.ndarray]:
    """JPEGs of the demo, and their heights and widths."""
    images = [content for _, content in islice(loader_benchmark.source_pictures(), count)]
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
        fields = {"labels": Labels(LabelStore(labels, index))}
        order = SampleOrder(index.counts, 1, 512, 0)
        images, plain = StreamSlice((0,), batch, 1), AugmentConfig()
        training = TrainLoader(index, fields, order, images, form, plain, DEVICE, threads)
        batches = training.batches(0)
        result["training_images_per_s"] = throughput(batches, batch)
        batches.close()
        training.close()
        jitter = AugmentConfig(color_jitter=0.4, hue_jitter=36)
        coloured = TrainLoader(index, fields, order, images, form, jitter, DEVICE, threads)
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


PARTS: dict[str, Callable[[], dict]] = {
    "ceilings": ceilings,
    "kernels": kernels,
    "head": head,
    "host_waits": host_waits,
    "step_waits": step_waits,
    "assign": assign,
    "lloyd": lloyd,
    "backbone": backbone,
    "pixels": pixels,
    "loader": loader,
    "training": training,
    "demo": demo,
}


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there, after each part")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some of the parts")
    parser.add_argument("--commit", default=git_commit(), help="of this tree, where it has no .git")
    arguments = parser.parse_args()
    result: dict[str, object] = {"device": head_benchmark.device_name(), "commit": arguments.commit}
    result["versions"] = library_versions()
    has_failed = False
    for name in arguments.only:
        began = time.monotonic()
        try:
            figures = PARTS[name]()
        except Exception as error:
            figures, has_failed = {"failed": f"{type(error).__name__}: {error}"[:2000]}, True
            traceback.print_exc()
        result[name] = {**figures, "took_s": round(time.monotonic() - began, 1)}
        sys.stdout.write(f"{name}: {json.dumps(result[name], indent=1)}\n")
        sys.stdout.flush()
        release()
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
