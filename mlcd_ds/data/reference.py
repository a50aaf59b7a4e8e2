"""The plain loader: what the DALI graph computes, in Pillow and numpy, one image at a time. The oracle of its tests.

Also the specification. Both ways decode alike: EXIF orientation applied, alpha dropped, grey, CMYK and 16 bits turned
into 8-bit RGB.

- `load`, to train: cut the box, resize with an antialiased cubic filter and round to whole grey levels, change
  the colours and round again, mirror, normalise. The filter sees nothing outside the
  box: its edge pixels are repeated there.
- `load_whole`, to embed and evaluate: resize the whole image by Pillow, cut its centre, normalise: what transformers'
  image processors (their Pillow backend) do.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mlcd_ds.data.dali import EncodedBatch, WholeImages
from mlcd_ds.data.frames import cubic
from mlcd_ds.data.pixels import PixelFormat


def decode(encoded: bytes) -> np.ndarray:
    """uint8 [height, width, 3], RGB, upright. Raises OSError (Pillow's) for bytes that are no image."""
    with Image.open(io.BytesIO(encoded)) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I;16"):  # Pillow would clip it to 255
            image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
        return np.array(image.convert("RGB"))


def filter_matrix(size_in: int, size_out: int, antialias: bool = True) -> np.ndarray:
    """float64 [size_out, size_in]: weights of the input pixels in each output pixel; rows sum to one.

    Pixels are squares with their centres at one half; antialiasing widens the kernel by the scale when shrinking.
    """
    scale = size_in / size_out
    width = max(scale, 1.0) if antialias else 1.0
    centers = (np.arange(size_out) + 0.5) * scale
    taps = np.arange(int(np.floor(-2 * width)) - 1, size_in + int(np.ceil(2 * width)) + 1)
    weights = cubic((taps[None, :] + 0.5 - centers[:, None]) / width)
    weights /= weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((size_out, size_in))
    np.add.at(matrix.T, taps.clip(0, size_in - 1), weights.T)
    return matrix


def resize(pixels_HW3: np.ndarray, size: int, antialias: bool = True) -> np.ndarray:
    """uint8 [size, size, 3]: `filter_matrix` along both sides, rounded once, at the end."""
    height, width = pixels_HW3.shape[:2]
    rows, columns = filter_matrix(height, size, antialias), filter_matrix(width, size, antialias)
    resized = np.einsum("oh,hwc,pw->opc", rows, pixels_HW3.astype(np.float64), columns, optimize=True)
    return np.floor(resized + 0.5).clip(0, 255).astype(np.uint8)


def crop_resize_flip(pixels_HW3: np.ndarray, box: Sequence[int], is_flipped: bool, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: the box (top, left, height, width) of a decoded image, resized and perhaps mirrored."""
    top, left, height, width = (int(value) for value in box)
    assert 0 <= top < top + height <= pixels_HW3.shape[0] and 0 <= left < left + width <= pixels_HW3.shape[1], box
    resized = resize(pixels_HW3[top : top + height, left : left + width], size)
    return resized[:, ::-1] if is_flipped else resized


RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])


def twist(pixels_HW3: np.ndarray, colors: Sequence[float]) -> np.ndarray:
    """uint8 [height, width, 3]: hue turned and saturation scaled in YIQ, contrast about grey 128, then brightness."""
    brightness, contrast, saturation, hue = (float(value) for value in colors)
    sine, cosine = np.sin(np.deg2rad(hue)), np.cos(np.deg2rad(hue))
    turn = np.array([[1, 0, 0], [0, cosine, sine], [0, -sine, cosine]]) * [1, saturation, saturation]
    matrix = np.linalg.inv(RGB_TO_YIQ) @ turn @ RGB_TO_YIQ
    values = brightness * (contrast * (pixels_HW3 @ matrix.T - 128) + 128)
    return np.floor(values + 0.5).clip(0, 255).astype(np.uint8)


def normalise(pixels_HW3: np.ndarray, pixels: PixelFormat) -> np.ndarray:
    """fp32 [3, height, width]."""
    return ((pixels_HW3 - np.array(pixels.mean)) / pixels.std).transpose(2, 0, 1).astype(np.float32)


def load(batch: EncodedBatch, pixels: PixelFormat) -> Tensor:
    """Images fp32 [B, 3, S, S] to train on: what ImageDecoder gives for the batch."""
    images = []
    colors_B = [None] * len(batch.images) if batch.colors_B4 is None else batch.colors_B4
    for encoded, box, is_flipped, colors in zip(batch.images, batch.boxes_B4, batch.flips_B, colors_B, strict=True):
        image = crop_resize_flip(decode(encoded), box, bool(is_flipped), pixels.image_size)
        images.append(normalise(image if colors is None else twist(image, colors), pixels))
    return torch.from_numpy(np.stack(images))


def resize_and_center(pixels_HW3: np.ndarray, pixels: PixelFormat) -> np.ndarray:
    """uint8 [S, S, 3]: a whole decoded image, resized, and its centre cut out or put into a black square."""
    height, width = pixels.resized(*pixels_HW3.shape[:2])
    image = Image.fromarray(pixels_HW3).resize((width, height), Image.Resampling[pixels.interpolation.upper()])
    left, top = (width - pixels.image_size) // 2, (height - pixels.image_size) // 2
    return np.asarray(image.crop((left, top, left + pixels.image_size, top + pixels.image_size)))  # Pillow pads: black


def load_whole(batch: WholeImages, pixels: PixelFormat) -> Tensor:
    """Images fp32 [B, 3, S, S] to evaluate: what EvaluationDecoder gives for the batch."""
    images = [normalise(resize_and_center(decode(encoded), pixels), pixels) for encoded in batch.images]
    return torch.from_numpy(np.stack(images))
