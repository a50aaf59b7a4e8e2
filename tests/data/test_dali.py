"""DALI's pixels against the plain loader (mlcd_ds/data/reference.py), on the 0-255 scale.

Measured with DALI 2.4.0, Pillow 13 on the CPU: no pixel is further away than one grey level (the two round to whole
levels at other moments), and on photographs, drawings and noise alike fewer than 3% of them differ at all.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from shard_maker import DEMO_SHARDS, encode, picture

from mlcd_ds.data import reference
from mlcd_ds.data.colors import random_colors
from mlcd_ds.data.crops import random_boxes
from mlcd_ds.data.dali import EncodedBatch, ImageDecoder, decoded_sizes
from mlcd_ds.data.pixels import PixelFormat, center_square, clip_pixels
from mlcd_ds.errors import UserError

MAX_DIFFERENCE = 1.0
MEAN_DIFFERENCE = 0.04  # measured: 0.028 (noise), 0.0065 (smooth), 0.0034 (drawings)
CPU = torch.device("cpu")


def grey_levels(size: int) -> PixelFormat:
    """Not normalised."""
    return center_square(size, (0.0,) * 3, (1.0,) * 3)


def by_dali(batch: EncodedBatch, pixels: PixelFormat) -> torch.Tensor:
    decoder = ImageDecoder(len(batch.images), pixels, CPU, num_threads=1)
    decoder.push(batch)
    return decoder.pop()


def differences(batch: EncodedBatch, size: int, wanted: torch.Tensor | None = None) -> tuple[float, float]:
    """Mean and largest absolute difference between DALI and the plain loader."""
    wanted = reference.load(batch, grey_levels(size)) if wanted is None else wanted
    off = (by_dali(batch, grey_levels(size)) - wanted).abs()
    return float(off.mean()), float(off.max())


def assert_same_pixels(batch: EncodedBatch, size: int, wanted: torch.Tensor | None = None) -> None:
    mean, largest = differences(batch, size, wanted)
    assert mean <= MEAN_DIFFERENCE and largest <= MAX_DIFFERENCE, f"mean {mean:.4f}, largest {largest:.1f}"


def sizes_of(images: list[bytes]) -> np.ndarray:
    return np.array([reference.decode(image).shape[:2] for image in images])


def centred(images: list[bytes]) -> EncodedBatch:
    """The largest square in the middle of each."""
    sizes_N2 = sizes_of(images)
    side_N1 = sizes_N2.min(axis=1, keepdims=True)
    boxes_N4 = np.hstack([(sizes_N2 - side_N1) // 2, side_N1, side_N1]).astype(np.int32)
    return EncodedBatch(images, boxes_N4, np.zeros(len(images), np.int32))


def augmented(images: list[bytes], seed: int = 0) -> EncodedBatch:
    ids = np.arange(len(images))
    boxes, flips = random_boxes(sizes_of(images), ids, 0, seed, (0.3, 1.0), (0.75, 1.3333))
    return EncodedBatch(images, boxes, flips)


@pytest.fixture(scope="module")
def drawings() -> list[bytes]:
    """JPEGs of the demo set, 128 x 128."""
    with tarfile.open(DEMO_SHARDS / "test" / "00000.tar") as archive:
        members = [member for member in archive if member.name.endswith(".jpg")][:48]
        return [archive.extractfile(member).read() for member in members]


def waves(height: int = 231, width: int = 173) -> np.ndarray:
    """A smooth picture."""
    y, x = np.mgrid[0:height, 0:width] / 200
    parts = [np.sin(2 * np.pi * (a * x + b * y) + c) for a, b, c in ((1, 2, 0), (3, 1, 1), (2, 4, 2))]
    return np.round(127.5 + 127.5 * np.stack(parts, axis=-1)).astype(np.uint8)


@pytest.mark.parametrize("size", [32, 96, 128, 224], ids=lambda size: f"to {size}")
def test_drawings_centred_and_augmented(drawings: list[bytes], size: int) -> None:
    assert_same_pixels(centred(drawings), size)
    batch = augmented(drawings)
    assert 0.3 < batch.flips_B.mean() < 0.7
    assert_same_pixels(batch, size)


def sixteen_bits(pixels: np.ndarray) -> bytes:
    return encode(pixels[..., 0].astype(np.uint16) * 257, "PNG")


def with_alpha(pixels: np.ndarray, mode: str) -> bytes:
    return encode(np.concatenate([pixels, pixels[:, ::-1, :1]], axis=-1), "PNG", mode)


def turned(pixels: np.ndarray) -> bytes:
    exif = Image.Exif()
    exif[0x112] = 6  # orientation: to be turned by 90 degrees
    return encode(pixels, exif=exif)


KINDS: dict[str, Callable[[np.ndarray], bytes]] = {
    "jpeg 4:2:0": encode,
    "jpeg 4:4:4": lambda pixels: encode(pixels, subsampling=0),
    "progressive": lambda pixels: encode(pixels, progressive=True),
    "turned by EXIF": turned,
    "grey jpeg": lambda pixels: encode(pixels, mode="L"),
    "cmyk jpeg": lambda pixels: encode(pixels, mode="CMYK"),
    "png": lambda pixels: encode(pixels, "PNG"),
    "grey png": lambda pixels: encode(pixels, "PNG", "L"),
    "palette png": lambda pixels: encode(pixels, "PNG", "P"),
    "16-bit png": sixteen_bits,
    "png with alpha": lambda pixels: with_alpha(pixels, "RGBA"),  # both drop it, neither blends
    "grey png with alpha": lambda pixels: with_alpha(pixels, "LA"),
    "webp": lambda pixels: encode(pixels, "WEBP", lossless=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_files(kind: str) -> None:
    images = [KINDS[kind](pixels) for pixels in (waves(), picture(0, 231, 173))]
    assert decoded_sizes(images, 1) == [tuple(size) for size in sizes_of(images)]
    for size in (48, 300):
        assert_same_pixels(centred(images), size)
        assert_same_pixels(augmented(images), size)


def test_tiny_and_narrow_images() -> None:
    images = [encode(picture(i, *size), "PNG") for i, size in enumerate([(1, 1), (1, 50), (50, 1), (2, 3), (300, 2)])]
    assert_same_pixels(centred(images), 32)
    for seed in range(4):
        assert_same_pixels(augmented(images, seed), 32)


def test_normalisation(drawings: list[bytes]) -> None:
    batch, pixels = augmented(drawings[:4]), clip_pixels(64)
    off = (by_dali(batch, pixels) - reference.load(batch, pixels)).abs()
    assert off.max() <= MAX_DIFFERENCE / min(pixels.std) + 1e-5


def by_colours(images: list[bytes], jitter: float, hue: float, size: int) -> tuple[torch.Tensor, EncodedBatch]:
    """DALI's images with changed colours, and the batch that names the changes."""
    batch = augmented(images)
    batch = replace(batch, colors_B4=random_colors(np.arange(len(images)), 0, 5, jitter, hue))
    decoder = ImageDecoder(len(images), grey_levels(size), torch.device("cpu"), 1, changes_colors=True)
    decoder.push(batch)
    return decoder.pop(), batch


def test_colours(drawings: list[bytes]) -> None:
    """A grey level of the resize grows by the factors of contrast, brightness and saturation, and rounds once more."""
    got, batch = by_colours(drawings, 0.4, 36.0, 48)
    off = (got - reference.load(batch, grey_levels(48))).abs()
    assert off.max() <= 6 and off.mean() < 0.1, (off.max(), off.mean())  # measured 3 and 0.02
    unchanged = by_colours(drawings, 0.0, 0.0, 48)[0]
    assert (unchanged - reference.load(augmented(drawings), grey_levels(48))).abs().max() <= 1
    for number in range(4):  # each of the four counts
        other = batch.colors_B4.copy()
        other[:, number] = 0.0 if number == 3 else 1.0
        twin = reference.load(replace(batch, colors_B4=other), grey_levels(48))
        assert (got - twin).abs().max() > 20 and (got - twin).abs().mean() > 1
    turned_back = batch.colors_B4 * [1, 1, 1, -1]
    assert (got - reference.load(replace(batch, colors_B4=turned_back), grey_levels(48))).abs().mean() > 1


def test_resize_agrees_with_torch_inside(drawings: list[bytes]) -> None:
    """The oracle has an oracle: torch's antialiased cubic, away from the border (it leaves out what lies beyond)."""
    image = reference.decode(drawings[0])
    for size, margin in ((48, 3), (200, 5)):
        wanted = torch.nn.functional.interpolate(
            torch.tensor(image).permute(2, 0, 1)[None].double(), size=(size, size), mode="bicubic", antialias=True
        )
        off = wanted[0].permute(1, 2, 0).clamp(0, 255).numpy() - reference.resize(image, size)
        assert np.abs(off[margin:-margin, margin:-margin]).max() <= 0.5 + 1e-6


def shifted(batch: EncodedBatch) -> torch.Tensor:
    boxes = batch.boxes_B4.copy()
    boxes[:, 1] = np.where(boxes[:, 1] > 0, boxes[:, 1] - 1, boxes[:, 1] + (boxes[:, 1] + boxes[:, 3] < 128))
    return reference.load(EncodedBatch(batch.images, boxes, batch.flips_B), grey_levels(48))


def unflipped(batch: EncodedBatch) -> torch.Tensor:
    return reference.load(EncodedBatch(batch.images, batch.boxes_B4, 0 * batch.flips_B), grey_levels(48))


def aliased(batch: EncodedBatch) -> torch.Tensor:
    images = []
    for encoded, (top, left, height, width), flip in zip(batch.images, batch.boxes_B4, batch.flips_B, strict=True):
        cut = reference.decode(encoded)[top : top + height, left : left + width]
        images.append(reference.resize(cut, 48, antialias=False)[:, :: -1 if flip else 1].transpose(2, 0, 1))
    return torch.tensor(np.stack(images)).float()


def colours_swapped(batch: EncodedBatch) -> torch.Tensor:
    return reference.load(batch, grey_levels(48)).flip(1)


@pytest.mark.parametrize("mistake", [shifted, unflipped, aliased, colours_swapped])
def test_known_bad_twins_fail(drawings: list[bytes], mistake: Callable[[EncodedBatch], torch.Tensor]) -> None:
    batch = augmented(drawings)
    mean, largest = differences(batch, 48, mistake(batch))
    assert mean > 5 * MEAN_DIFFERENCE and largest > 10 * MAX_DIFFERENCE, (mean, largest)
    with pytest.raises(AssertionError):
        assert_same_pixels(batch, 48, mistake(batch))


def test_batches_come_out_in_order_and_may_be_short(drawings: list[bytes]) -> None:
    decoder = ImageDecoder(8, grey_levels(32), CPU, num_threads=2)
    parts = [drawings[0:8], drawings[8:11], drawings[11:19], drawings[19:20]]
    got = []
    for first, second in (parts[:2], parts[2:]):
        decoder.push(centred(first))
        decoder.push(centred(second))
        got += [decoder.pop(), decoder.pop()]
    assert [len(images) for images in got] == [8, 3, 8, 1]
    alone = by_dali(centred(drawings[:20]), grey_levels(32))
    assert torch.equal(torch.cat(got), alone)


def test_decoded_sizes_finds_the_broken_among_the_sound(drawings: list[bytes]) -> None:
    images = [*drawings[:5], drawings[5][:400], b"no image", *drawings[6:9], b""]
    assert decoded_sizes(images, 2) == [(128, 128)] * 5 + [None, None] + [(128, 128)] * 3 + [None]
    assert decoded_sizes([], 2) == []


def test_a_broken_image_while_training_is_one_clear_message(drawings: list[bytes]) -> None:
    batch = EncodedBatch([drawings[0], b"no image"], np.array([[0, 0, 8, 8]] * 2, np.int32), np.zeros(2, np.int32))
    with pytest.raises(UserError, match="mlcd index --overwrite") as caught:
        by_dali(batch, grey_levels(32))
    assert "\n" not in str(caught.value)


def test_reference_refuses_a_box_outside(drawings: list[bytes]) -> None:
    with pytest.raises(AssertionError):
        reference.crop_resize_flip(reference.decode(drawings[0]), (0, 100, 28, 29), False, 32)
    with pytest.raises(OSError):
        reference.decode(io.BytesIO(b"no image").getvalue())
