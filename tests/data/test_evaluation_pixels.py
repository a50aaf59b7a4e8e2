"""Evaluation's pixels: DALI against the plain loader, and the plain loader against transformers' own processor."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shard_maker import encode, picture

from mlcd_ds.data import reference
from mlcd_ds.data.dali import EvaluationDecoder, WholeImages
from mlcd_ds.data.pixels import PixelFormat, center_square

MEAN_DIFFERENCE = 0.5  # of 255, of each image. Measured: 0.36 (noise, 2000 x 301 to 256), 0.10 (smooth)
SIZES = (
    *((375, 500), (500, 375), (224, 224), (401, 399), (640, 480), (31, 47), (112, 112), (65, 64), (20, 90)),
    *((1, 1), (1, 2), (3, 2), (1, 1000), (1000, 1), (63, 900), (2000, 301)),
)
PLAIN = ((0.0,) * 3, (1.0,) * 3)
FORMATS = {
    "clip 64": center_square(64, *PLAIN),
    "clip 224": center_square(224, *PLAIN),
    "odd side": center_square(77, *PLAIN),
    "cut": PixelFormat(224, *PLAIN, resize=256),
    "rim": PixelFormat(64, *PLAIN, resize=48),
    "odd rim": PixelFormat(64, *PLAIN, resize=49),
    "stretched": PixelFormat(96, *PLAIN, resize=(96, 96)),
    "stretched and cut": PixelFormat(64, *PLAIN, resize=(80, 48)),
    "not resized": PixelFormat(64, *PLAIN, resize=None),
    "bilinear": PixelFormat(64, *PLAIN, resize=64, interpolation="bilinear"),
    "lanczos": PixelFormat(64, *PLAIN, resize=64, interpolation="lanczos"),
}


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width] / 200
    parts = [np.sin(2 * np.pi * (a * x + b * y) + c) for a, b, c in ((1, 2, 0), (3, 1, 1), (2, 4, 2))]
    return np.round(127.5 + 127.5 * np.stack(parts, axis=-1)).astype(np.uint8)


@pytest.fixture(scope="module")
def images() -> WholeImages:
    """Noise and smooth pictures of all sizes, losslessly."""
    pictures = [picture(seed, *size) for seed, size in enumerate(SIZES)] + [smooth(*size) for size in SIZES]
    return WholeImages([encode(pixels, "PNG") for pixels in pictures], np.array(SIZES * 2))


def by_dali(batch: WholeImages, pixels: PixelFormat) -> torch.Tensor:
    decoder = EvaluationDecoder(len(batch.images), pixels, torch.device("cpu"), num_threads=1)
    decoder.push(batch)
    return decoder.pop()


def largest_mean_difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).abs().mean((1, 2, 3)).max())


@pytest.mark.parametrize("name", FORMATS)
def test_dali_gives_what_the_plain_loader_gives(images: WholeImages, name: str) -> None:
    pixels = FORMATS[name]
    off = (by_dali(images, pixels) - reference.load_whole(images, pixels)).abs().mean((1, 2, 3))
    print(name, float(off.max()), (SIZES * 2)[int(off.argmax())], int(off.argmax()))
    assert off.max() <= MEAN_DIFFERENCE, [*zip(SIZES * 2, off.tolist(), strict=True)]
