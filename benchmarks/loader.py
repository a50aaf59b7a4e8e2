"""Loader: from tars to normalised batches at 224 px, against webdataset with Pillow in worker processes.

  python benchmarks/loader.py [--json FILE]

Both read the same tars (the demo's pictures, enlarged to 384 px as JPEG), decode, crop at random, resize to 224 px with
an antialiased cubic filter, mirror half and normalise. Ours: the training loader, one process, two decoding threads.
Theirs: webdataset's pipeline with two DataLoader workers, as its users write it. Throughput is images/s over an epoch
without the first batch, in turn in one run; `throughput_ratio_vs_webdataset` is ours over theirs, the median of rounds.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor

from mlcd_ds.artefacts.manifest import library_versions
from mlcd_ds.data.fields import DataField, Labels, TrainingData
from mlcd_ds.data.label_store import LabelStore
from mlcd_ds.data.loader import AugmentConfig, StreamSlice, TrainLoader
from mlcd_ds.data.order import SampleOrder
from mlcd_ds.data.pixels import CLIP_MEAN, CLIP_STD, clip_pixels
from mlcd_ds.data.shard_index import ShardIndex
from mlcd_ds.engine.checkpoint import git_commit

SOURCES = sorted((Path(__file__).resolve().parents[1] / "demo/shards/train").glob("*.tar"))
NUM_SHARDS, IMAGES_PER_SHARD, STORED_SIZE = 4, 256, 384
BATCH, SIZE, WORKERS, ROUNDS = 64, 224, 2, 5
NUM_BATCHES = NUM_SHARDS * IMAGES_PER_SHARD // BATCH


def make_shards(folder: Path) -> list[Path]:
    """Tars of enlarged pictures, as photographs of the web are stored."""
    pictures = source_pictures()
    paths = [folder / f"{number:05d}.tar" for number in range(NUM_SHARDS)]
    for path in paths:
        with webdataset.TarWriter(str(path)) as writer:
            for key, content, caption in islice(pictures, IMAGES_PER_SHARD):
                image = Image.open(io.BytesIO(content)).convert("RGB").resize((STORED_SIZE, STORED_SIZE))
                encoded = io.BytesIO()
                image.save(encoded, "JPEG", quality=90)
                writer.write({"__key__": f"{path.stem}-{key}", "jpg": encoded.getvalue(), "txt": caption})
    return paths


def source_pictures() -> Iterator[tuple[str, bytes, str]]:
    """Keys, JPEGs and captions of the demo; these are made as long as those of the web."""
    for sample in webdataset.WebDataset([str(path) for path in SOURCES], shardshuffle=False):
        yield (
            sample["__key__"],
            sample["jpg"],
            f"{sample['txt'].decode()}, a drawing from a collection of free clip art",
        )


def label_shards(shards: Path, folder: Path) -> tuple[ShardIndex, LabelStore]:
    """The stages before training."""
    index, embeddings, clusters, labels = (folder / name for name in ("index", "embeddings", "clusters", "labels"))
    for words in (
        ["index", "--shards", f"{shards}/*.tar", "--out", index],
        ["embed", "--index", index, "--encoder", "pixels@8", "--out", embeddings],
        ["cluster", "--embeddings", embeddings, "--num-centers", 16, "--out", clusters],
        ["assign", "--embeddings", embeddings, "--clusters", clusters, "--out", labels],
    ):
        command = [sys.executable, "-m", "mlcd_ds", *map(str, words)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    opened = ShardIndex(index)
    return opened, LabelStore(labels, opened)


def ours(index: ShardIndex, labels: LabelStore, **fields: DataField) -> Iterator[Tensor]:
    """An epoch of the training loader's images, with labels and perhaps other fields."""
    order = SampleOrder(index.counts, 1, shuffle_window=512, seed=0)
    batch_slice = StreamSlice((0,), BATCH, 1)
    pixels, augment = clip_pixels(SIZE), AugmentConfig()
    data = TrainingData(index, {"labels": Labels(labels), **fields})
    loader = TrainLoader(data, order, batch_slice, pixels, augment, torch.device("cpu"), WORKERS)
    batches = loader.batches(0)
    for batch in islice(batches, NUM_BATCHES):
        yield batch.images_B3SS
    batches.close()
    loader.close()


def augmented(image: Image.Image) -> Tensor:
    """A random crop of 70 to 100 % of the area, resized, perhaps mirrored, normalised: fp32 [3, S, S]."""
    width, height = image.size
    area, aspect = random.uniform(0.7, 1.0) * width * height, random.uniform(0.8, 1.25)
    wide, high = min(width, round((area * aspect) ** 0.5)), min(height, round((area / aspect) ** 0.5))
    left, top = random.randint(0, width - wide), random.randint(0, height - high)
    image = image.crop((left, top, left + wide, top + high)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def one_thread(_: int) -> None:
    """As DataLoader's workers have it."""
    torch.set_num_threads(1)


def theirs(shards: list[Path]) -> Iterator[Tensor]:
    """An epoch of webdataset with worker processes."""
    data = webdataset.WebDataset([str(path) for path in shards], shardshuffle=NUM_SHARDS).shuffle(512).decode("pil")
    data = data.to_tuple("jpg").map_tuple(augmented).batched(BATCH, partial=False)
    for (images,) in webdataset.WebLoader(data, batch_size=None, num_workers=WORKERS, worker_init_fn=one_thread):
        yield images


def images_per_s(epoch: Iterable[Tensor]) -> float:
    """Throughput after the first batch, with which processes and threads have started."""
    batches = iter(epoch)
    first = next(batches)
    assert first.shape == (BATCH, 3, SIZE, SIZE)
    began, count = time.perf_counter(), 0
    for images in batches:
        count += len(images)
    return count / (time.perf_counter() - began)


def main() -> None:
    """Measure in turn, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        shards = Path(name) / "shards"
        shards.mkdir()
        paths = make_shards(shards)
        index, labels = label_shards(shards, Path(name))
        rounds = [(images_per_s(ours(index, labels)), images_per_s(theirs(paths))) for _ in range(ROUNDS)]
    ratios = [mine / other for mine, other in rounds]
    result = {
        "throughput_ratio_vs_webdataset": statistics.median(ratios),
        "ratios": ratios,
        "images_per_s": [[round(value) for value in pair] for pair in rounds],
        "batch": BATCH,
        "workers": WORKERS,
        "commit": git_commit(),
        "versions": library_versions(),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(f"ours over webdataset: {result['throughput_ratio_vs_webdataset']:.2f} x images/s ")
    sys.stdout.write(f"({min(ratios):.2f} - {max(ratios):.2f} in {ROUNDS} rounds)\n")


if __name__ == "__main__":
    main()
