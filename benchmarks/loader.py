"""Loader: DALI's graph against the plain Pillow path, side by side in one run, on the pictures of the demo.

  python benchmarks/loader.py [--json FILE]

Both decode, crop, resize and normalise the same batches with the same number of threads (Pillow in a thread pool; it
releases the interpreter's lock while it works). `throughput_ratio_vs_plain` is DALI's images/s over Pillow's, the
median of the rounds.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mlcd_ds.artefacts.manifest import library_versions
from mlcd_ds.data.crops import random_boxes
from mlcd_ds.data.dali import EncodedBatch, ImageDecoder
from mlcd_ds.data.pixels import PixelFormat, clip_pixels

SHARD = Path(__file__).resolve().parents[1] / "demo/shards/train/00000.tar"
BATCH, IMAGE_SIZE, THREADS, ROUNDS, BATCHES = 128, 96, 2, 5, 4


def read_images(count: int) -> list[bytes]:
    """The first JPEGs of a shard."""
    with tarfile.open(SHARD) as archive:
        members = [member for member in archive if member.name.endswith(".jpg")][:count]
        return [archive.extractfile(member).read() for member in members]


def plain_image(content: bytes, box: np.ndarray, is_flipped: bool, pixels: PixelFormat) -> np.ndarray:
    """One image by Pillow and numpy: fp32 [3, S, S]."""
    top, left, height, width = (int(value) for value in box)
    with Image.open(io.BytesIO(content)) as opened:
        image = opened.convert("RGB").crop((left, top, left + width, top + height))
    image = image.resize((pixels.image_size, pixels.image_size), Image.Resampling.BICUBIC)
    values = np.asarray(image, dtype=np.float32)[:, ::-1] if is_flipped else np.asarray(image, dtype=np.float32)
    return ((values - np.float32(pixels.mean)) / np.float32(pixels.std)).transpose(2, 0, 1)


def images_per_s(work: Callable[[], object]) -> float:
    """Throughput of `work`, which handles one batch."""
    began = time.perf_counter()
    for _ in range(BATCHES):
        work()
    return BATCH * BATCHES / (time.perf_counter() - began)


def main() -> None:
    """Measure in turn, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    images = read_images(BATCH)
    boxes_B4, flips_B = random_boxes(
        np.full((BATCH, 2), 128), np.arange(BATCH), epoch=0, seed=0, area=(0.4, 1.0), aspect=(0.75, 1.3333)
    )
    batch, pixels = EncodedBatch(images, boxes_B4, flips_B), clip_pixels(IMAGE_SIZE)
    decoder = ImageDecoder(BATCH, pixels, torch.device("cpu"), THREADS)

    def dali() -> None:
        decoder.push(batch)
        decoder.pop()

    with ThreadPoolExecutor(THREADS) as pool:

        def plain() -> None:
            one = [pool.submit(plain_image, images[i], boxes_B4[i], bool(flips_B[i]), pixels) for i in range(BATCH)]
            torch.from_numpy(np.stack([future.result() for future in one]))

        dali(), plain()  # warm up
        rounds = [(images_per_s(dali), images_per_s(plain)) for _ in range(ROUNDS)]
    ratios = [fast / slow for fast, slow in rounds]
    result = {
        "throughput_ratio_vs_plain": statistics.median(ratios),
        "ratios": ratios,
        "batch": BATCH,
        "threads": THREADS,
        "versions": library_versions(),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(f"DALI over plain: {result['throughput_ratio_vs_plain']:.2f} x images/s ({min(ratios):.2f}")
    sys.stdout.write(f" - {max(ratios):.2f} in {ROUNDS} rounds)\n")


if __name__ == "__main__":
    main()
