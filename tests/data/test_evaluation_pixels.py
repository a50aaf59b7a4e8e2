"""Evaluation's pixels: DALI against the plain loader, which tests/encoders compares with transformers' processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from shard_maker import encode, picture

from mlcd_ds.data import frames, reference
from mlcd_ds.data.dali import EncodedBatch, EvaluationDecoder, ImageDecoder, WholeImages
from mlcd_ds.data.frames import evaluation_frames
from mlcd_ds.data.pixels import PixelFormat, center_square, clip_pixels

MEAN_DIFFERENCE = 0.5  # of 255, of each image. Measured: 0.25 (noise), 0.23 (smooth)
SIZES = (
    *((375, 500), (500, 375), (224, 224), (401, 399), (640, 480), (31, 47), (112, 112), (65, 64), (20, 90)),
    *((1, 1), (1, 2), (3, 2), (1, 1000), (1000, 1), (63, 900), (2000, 301)),
)
PLAIN = ((0.0,) * 3, (1.0,) * 3)
FORMATS = {
    "clip 64": center_square(64, *PLAIN),
    "odd side": center_square(77, *PLAIN),
    "cut": PixelFormat(112, *PLAIN, resize=128),
    "rim": PixelFormat(64, *PLAIN, resize=48),
    "odd rim": PixelFormat(64, *PLAIN, resize=49),
    "stretched": PixelFormat(96, *PLAIN, resize=(96, 96)),
    "stretched and cut": PixelFormat(64, *PLAIN, resize=(80, 48)),
    "not resized": PixelFormat(64, *PLAIN, resize=None),
    "bilinear": PixelFormat(64, *PLAIN, resize=64, interpolation="bilinear"),
    "lanczos": PixelFormat(64, *PLAIN, resize=64, interpolation="lanczos"),
}
CPU = torch.device("cpu")


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
    decoder = EvaluationDecoder(len(batch.images), pixels, CPU, num_threads=1)
    decoder.push(batch)
    return decoder.pop()


def differences(batch: WholeImages, got: torch.Tensor, pixels: PixelFormat) -> np.ndarray:
    """Of each image, the mean difference from the plain loader."""
    return (got - reference.load_whole(batch, pixels)).abs().mean((1, 2, 3)).numpy()


@pytest.mark.parametrize("name", FORMATS)
def test_dali_gives_what_the_plain_loader_gives(images: WholeImages, name: str) -> None:
    off = differences(images, by_dali(images, FORMATS[name]), FORMATS[name])
    assert off.max() <= MEAN_DIFFERENCE, [*zip(SIZES * 2, off.tolist(), strict=True)]


def test_jpegs_and_normalisation() -> None:
    """What is left is the JPEG decoders' own difference."""
    pictures = [smooth(375, 500), smooth(500, 375), picture(0, 50, 40)]
    batch = WholeImages([encode(pixels) for pixels in pictures], np.array([(375, 500), (500, 375), (50, 40)]))
    grey = WholeImages([encode(pixels, mode="L") for pixels in pictures], batch.sizes_B2)
    for chosen in (batch, grey):
        off = differences(chosen, by_dali(chosen, clip_pixels(64)), clip_pixels(64))
        assert off.max() <= MEAN_DIFFERENCE / max(clip_pixels(64).std)  # measured 0.2 levels


def test_known_bad_cutting_the_square_first(images: WholeImages) -> None:
    """The training graph, given the square in the middle: what evaluation did once."""
    batch = WholeImages([encode(picture(0, 500, 375), "PNG")], np.array([[500, 375]]))
    decoder = ImageDecoder(1, FORMATS["clip 64"], CPU, num_threads=1)
    decoder.push(EncodedBatch(batch.images, np.array([[62, 0, 375, 375]], np.int32), np.zeros(1, np.int32)))
    assert differences(batch, decoder.pop(), FORMATS["clip 64"])[0] > 2 * MEAN_DIFFERENCE


@pytest.mark.parametrize("mistake", ["sides swapped", "rounded up", "another filter", "no gains at the edge"])
def test_known_bad_frames(images: WholeImages, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = FORMATS["clip 64"]
    chosen = WholeImages([images.images[row] for row in (0, 1, 11)], images.sizes_B2[[0, 1, 11]])
    given, fed = chosen, pixels
    if mistake == "sides swapped":
        given = WholeImages(chosen.images, chosen.sizes_B2[:, ::-1])
    elif mistake == "rounded up":
        fed = PixelFormat(64, *PLAIN, resize=65)
    elif mistake == "another filter":
        fed = FORMATS["lanczos"]
    else:
        monkeypatch.setitem(frames.KERNELS, "bicubic", (frames.cubic, 0.0))
        frames._span.cache_clear()
    try:
        off = differences(chosen, by_dali(given, fed), pixels)
    finally:
        frames._span.cache_clear()
    assert off.max() > 1.5 * MEAN_DIFFERENCE


def test_a_strip_is_not_blown_up() -> None:
    """An image of 1 x 60,000 pixels, resized as a whole, would have 40 GB."""
    strip = encode(
        np.broadcast_to(np.arange(60_000)[None, :, None] // 300 + 20, (1, 60_000, 3)).astype(np.uint8), "PNG"
    )
    sizes = np.array([[1, 60_000]])
    read = evaluation_frames(sizes, clip_pixels(224)).windows_B4[0]
    assert read[2] == 3 and read[3] < 12
    square = by_dali(WholeImages([strip], sizes), center_square(224, *PLAIN))
    assert (square - (20 + 100)).abs().max() <= 1


def test_the_plain_loader_is_pillows(images: WholeImages) -> None:
    """Cut by hand from the image that Pillow resizes as a whole."""
    image = Image.fromarray(picture(1, 100, 60))
    resized = np.asarray(image.resize((64, 106), Image.Resampling.BICUBIC))  # int(64 * 100 / 60)
    assert np.array_equal(reference.resize_and_center(np.asarray(image), FORMATS["clip 64"]), resized[21:85])
