"""The pixels that a model takes."""

from __future__ import annotations

from dataclasses import dataclass

CLIP_MEAN = (0.48145466 * 255, 0.4578275 * 255, 0.40821073 * 255)
CLIP_STD = (0.26862954 * 255, 0.26130258 * 255, 0.27577711 * 255)


@dataclass(frozen=True)
class PixelFormat:
    """What a model eats: square side in pixels, and mean and deviation on the 0-255 scale, per RGB channel."""

    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def clip_pixels(image_size: int) -> PixelFormat:
    """CLIP's normalisation, which our backbones share."""
    return PixelFormat(image_size, CLIP_MEAN, CLIP_STD)
