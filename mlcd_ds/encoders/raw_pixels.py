"""The image itself as features: a baseline."""

from __future__ import annotations

from torch import nn

from mlcd_ds.data.pixels import center_square
from mlcd_ds.encoders.base import Encoder


def raw_pixels(size: int) -> Encoder:
    """The pixels of a small copy of the image, scaled to [-1, 1]."""
    pixels = center_square(size, (127.5,) * 3, (127.5,) * 3)
    return Encoder(f"pixels@{size}", pixels, nn.Identity(), lambda images: images.flatten(1))
