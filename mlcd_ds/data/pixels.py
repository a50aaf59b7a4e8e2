"""The pixels that a model takes, and how an image of any shape becomes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CLIP_MEAN = (0.48145466 * 255, 0.4578275 * 255, 0.40821073 * 255)
CLIP_STD = (0.26862954 * 255, 0.26130258 * 255, 0.27577711 * 255)

Interpolation = Literal["bilinear", "bicubic", "lanczos"]


@dataclass(frozen=True)
class PixelFormat:
    """What a model takes, and what embedding and evaluation do to get there, in this order:

    - resize (antialiased, to whole grey levels): `resize` is the length of the shorter edge, (height, width), or None;
    - cut the square of side `image_size` at the centre; black is added where the image is smaller;
    - normalise with `mean` and `std`, on the 0-255 scale, per RGB channel.

    Training crops at random instead, and uses `image_size`, `mean` and `std` only.
    """

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: int | tuple[int, int] | None
    interpolation: Interpolation = "bicubic"

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize; the longer edge is rounded down, as transformers does."""
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        if width <= height:
            return int(self.resize * height / width), self.resize
        return self.resize, int(self.resize * width / height)


def center_square(image_size: int, mean: tuple[float, float, float], std: tuple[float, float, float]) -> PixelFormat:
    """The shorter edge is resized to `image_size`, and the square in the middle cut out: CLIP's way."""
    return PixelFormat(image_size, mean, std, resize=image_size)


def clip_pixels(image_size: int) -> PixelFormat:
    """CLIP's preparation, which our backbones share."""
    return center_square(image_size, CLIP_MEAN, CLIP_STD)
