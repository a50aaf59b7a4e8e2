"""Evaluation's geometry, as numbers: which part of an image becomes the square that a model takes. DALI carries it out.

Resizing the whole image and cutting out the centre is one step here: only the region that becomes the square is
resampled, so that a strip of 1 x 1000 pixels is never blown up whole.

Near the image's edges Pillow, and with it transformers, leaves out what a filter sees beyond the image and scales the
rest up; DALI repeats the edge. So the image gets a black rim of one pixel, which DALI then repeats, and the rows and
columns of the square are scaled afterwards by `row_gains_BS` and `column_gains_BS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mlcd_ds.data.pixels import Interpolation, PixelFormat


@dataclass(frozen=True)
class Frames:
    """Of each image [B]:

    windows_B4        int32: top, left, height, width of the pixels that are read; at most one beyond the image (black)
    regions_B4        fp32: top, left, bottom, right of what becomes the square, as fractions of the window
    row_gains_BS      fp32: factor on each row of the square; 0 where the image does not reach
    column_gains_BS   fp32: the same for its columns
    in_two_passes_B   bool: whether columns and rows are to be resampled one after the other (see CLIPS_BELOW)
    """

    windows_B4: np.ndarray
    regions_B4: np.ndarray
    row_gains_BS: np.ndarray
    column_gains_BS: np.ndarray
    in_two_passes_B: np.ndarray


@dataclass(frozen=True)
class _Span:
    """One axis of a frame: first pixel and length of the window, region as fractions of it, gains."""

    first: int
    length: int
    begin: float
    end: float
    gains_S: np.ndarray


def evaluation_frames(sizes_B2: np.ndarray, pixels: PixelFormat) -> Frames:
    """The frames of images of these heights and widths."""
    side, kind = pixels.image_size, pixels.interpolation
    rows, columns, in_two_passes = [], [], []
    for height, width in sizes_B2.tolist():
        new_height, new_width = pixels.resized(height, width)
        rows.append(_span(height, new_height, side, kind))
        columns.append(_span(width, new_width, side, kind))
        in_two_passes.append(min(height / new_height, width / new_width) < CLIPS_BELOW[kind])
    pairs = list(zip(rows, columns, strict=True))
    return Frames(
        np.array([(y.first, x.first, y.length, x.length) for y, x in pairs], np.int32),
        np.array([(y.begin, x.begin, y.end, x.end) for y, x in pairs], np.float32),
        np.stack([y.gains_S for y in rows]),
        np.stack([x.gains_S for x in columns]),
        np.array(in_two_passes),
    )


@lru_cache(maxsize=4096)
def _span(before: int, after: int, side: int, kind: Interpolation) -> _Span:
    """One axis of an image, resized from `before` to `after` pixels, of which the middle `side` are kept."""
    kernel, radius = KERNELS[kind]
    offset, scale = (after - side) // 2, before / after  # below zero the square has a rim, placed as transformers does
    stretch = max(scale, 1.0)
    begin, end, reach = offset * scale, (offset + side) * scale, radius * stretch
    first = max(-1, int(np.floor(begin - reach)) - 1)
    length = min(before + 1, int(np.ceil(end + reach)) + 1) - first
    places_S = np.arange(offset, offset + side)
    gains_S = ((places_S >= 0) & (places_S < after)).astype(np.float32)
    centers_S = (places_S + 0.5) * scale
    for number in np.flatnonzero(gains_S * ((centers_S < reach) | (centers_S > before - reach))):
        center = centers_S[number]
        taps = np.arange(np.floor(center - reach), np.ceil(center + reach) + 1)
        weights = kernel((taps + 0.5 - center) / stretch)
        gains_S[number] = weights.sum() / weights[(taps >= 0) & (taps < before)].sum()
    gains_S.flags.writeable = False  # images of the same size share it
    return _Span(first, length, (begin - first) / length, (end - first) / length, gains_S)


def triangle(x: np.ndarray) -> np.ndarray:
    """The kernel of linear interpolation at distances `x`."""
    return np.maximum(1 - np.abs(x), 0)


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic kernel with a = -1/2 (Catmull-Rom), as in Pillow, in torch with antialiasing and in DALI."""
    x, a = np.abs(x), -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def lanczos(x: np.ndarray) -> np.ndarray:
    """Lanczos' kernel with three lobes."""
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


# Each kernel, and how far it reaches.
KERNELS: dict[Interpolation, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "bilinear": (triangle, 1.0),
    "bicubic": (cubic, 2.0),
    "lanczos": (lanczos, 3.0),
}
# Pillow cuts values off at 0 and 255 between its two passes. The cut shows where a kernel that overshoots does not
# shrink the image by at least this factor.
CLIPS_BELOW: dict[Interpolation, float] = {"bilinear": 0.0, "bicubic": 1.0, "lanczos": 1.5}
