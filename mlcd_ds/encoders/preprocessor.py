"""preprocessor_config.json: how a Hugging Face model's own processor makes its pixels, read whole and written.

Only processors that do no more than resize, cut the centre, rescale and normalise are accepted. What is read here gives
the pixels of `transformers.AutoImageProcessor.from_pretrained(FOLDER, backend="pil")`; the other backend rounds a
little differently. Two things are ours: EXIF orientation is applied, and alpha is dropped (transformers 5 lays such
images over white).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlcd_ds.artefacts.readers import read_json_object
from mlcd_ds.data.pixels import Interpolation, PixelFormat, clip_pixels
from mlcd_ds.errors import UserError

CONFIG_NAME = "preprocessor_config.json"
NESTED_NAME = "processor_config.json"  # of a whole CLIPProcessor, as transformers 5 saves it
FIX = "Take the file of the model's own release."
MAX_SIDE = 16384
RESAMPLE: dict[int, Interpolation] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
REFUSED_RESAMPLE = {0: "nearest", 4: "box", 5: "hamming"}  # DALI has no box and hamming, and rounds ties differently
KNOWN_STEPS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}

_EDGE, _BOTH = {"shortest_edge": 224}, {"height": 224, "width": 224}
_COMMON = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "crop_size": _BOTH}
# By processor, transformers' defaults for keys that a file leaves out (mean and deviation are never left out).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIP": _COMMON | {"size": _EDGE, "resample": 3, "do_center_crop": True, "int_is_square": False},
    "Bit": _COMMON | {"size": _EDGE, "resample": 3, "do_center_crop": True, "int_is_square": False},
    "Siglip": _COMMON | {"size": _BOTH, "resample": 3, "do_center_crop": False, "int_is_square": False},
    "ViT": _COMMON | {"size": _BOTH, "resample": 2, "do_center_crop": False, "int_is_square": True},
}


def read_pixels(folder: Path, image_size: int) -> PixelFormat:
    """The pixels of a model that takes squares of `image_size`; CLIP's own where the folder has no processor.

    UserError names the file and the key that cannot be followed.
    """
    if (folder / NESTED_NAME).exists():
        nested = read_json_object(folder / NESTED_NAME, FIX).get("image_processor")
        if nested is not None:
            return _Reader(folder / NESTED_NAME, nested).pixels(image_size)
    if (folder / CONFIG_NAME).exists():
        return _Reader(folder / CONFIG_NAME, read_json_object(folder / CONFIG_NAME, FIX)).pixels(image_size)
    return clip_pixels(image_size)


def preprocessor_config(pixels: PixelFormat) -> dict[str, Any]:
    """The content of a preprocessor_config.json that gives these pixels."""
    square = {"height": pixels.image_size, "width": pixels.image_size}
    size: dict[str, int] = square
    if isinstance(pixels.resize, int):
        size = {"shortest_edge": pixels.resize}
    elif pixels.resize is not None:
        size = {"height": pixels.resize[0], "width": pixels.resize[1]}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": pixels.resize is not None,
        "size": size,
        "resample": next(number for number, name in RESAMPLE.items() if name == pixels.interpolation),
        "do_center_crop": True,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [value / 255 for value in pixels.mean],
        "image_std": [value / 255 for value in pixels.std],
        "do_convert_rgb": True,
    }


def open_clip_preprocessing(pixels: PixelFormat) -> dict[str, Any]:
    """The same as a `preprocess_cfg` of open_clip, which resizes the shorter edge to the model's own size."""
    assert pixels.resize == pixels.image_size
    return {
        "mean": [value / 255 for value in pixels.mean],
        "std": [value / 255 for value in pixels.std],
        "interpolation": pixels.interpolation,
        "resize_mode": "shortest",
    }


@dataclass(frozen=True)
class _Reader:
    """The keys of one file, each checked as it is taken."""

    path: Path
    content: Any

    def error(self, key: str, problem: str) -> UserError:
        return UserError(f"{self.path}: {key} {problem}. {FIX}")

    def pixels(self, image_size: int) -> PixelFormat:
        if not isinstance(self.content, dict):
            raise self.error("image_processor", "must be a JSON object")
        self.defaults()  # first of all, whether the processor is known
        extra = [k for k, value in self.content.items() if k.startswith("do_") and k not in KNOWN_STEPS and value]
        if extra:
            raise self.error(extra[0], f"is a step that is not known here ({', '.join(sorted(KNOWN_STEPS))} are)")
        resize = self.resize() if self.flag("do_resize") else None
        crop = self.sides("crop_size", int_is_square=True) if self.flag("do_center_crop") else resize
        if not isinstance(crop, tuple):
            raise self.error("do_center_crop", "is false, and without it images keep different shapes")
        if crop != (image_size, image_size):
            raise self.error(
                "crop_size" if self.flag("do_center_crop") else "size",
                f"gives images of {crop[0]} x {crop[1]} pixels; the model takes {image_size} x {image_size}",
            )
        factor = self.number("rescale_factor", self.get("rescale_factor")) if self.flag("do_rescale") else 1.0
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if self.flag("do_normalize"):
            mean, std = self.channels("image_mean"), self.channels("image_std")
        if factor <= 0 or min(std) <= 0:
            raise self.error("rescale_factor" if factor <= 0 else "image_std", "must be above zero")
        red, green, blue = ((m / factor, s / factor) for m, s in zip(mean, std, strict=True))
        means, deviations = (red[0], green[0], blue[0]), (red[1], green[1], blue[1])
        return PixelFormat(image_size, means, deviations, resize, self.interpolation() if resize else "bicubic")

    def defaults(self) -> dict[str, Any]:
        name = self.content.get("image_processor_type") or self.content.get("feature_extractor_type") or "CLIP"
        kind = str(name)
        for ending in ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor"):
            kind = kind.removesuffix(ending)
        if kind not in _DEFAULTS:
            known = ", ".join(f"{known}ImageProcessor" for known in _DEFAULTS)
            raise self.error("image_processor_type", f"{name!r} is not one of {known}")
        return _DEFAULTS[kind]

    def get(self, key: str) -> Any:
        return self.content[key] if key in self.content else self.defaults()[key]

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, not {value!r}")
        return value

    def number(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(key, f"must be a number, not {value!r}")
        return float(value)

    def channels(self, key: str) -> tuple[float, float, float]:
        """A number for each of red, green and blue."""
        if key not in self.content:
            raise self.error(key, "is missing")
        values = self.content[key]
        values = values if isinstance(values, list) else [values] * 3
        if len(values) != 3:
            raise self.error(key, f"must have three numbers, not {len(values)}")
        red, green, blue = (self.number(key, value) for value in values)
        return red, green, blue

    def side(self, key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_SIDE:
            raise self.error(key, f"must be a whole number of pixels from 1 to {MAX_SIDE}, not {value!r}")
        return value

    def sides(self, key: str, int_is_square: bool) -> int | tuple[int, int]:
        """A size as shortest edge, or as height and width."""
        size = self.get(key)
        if isinstance(size, dict):
            given = {name: value for name, value in size.items() if value is not None}
            if given.keys() == {"shortest_edge"} and not int_is_square:
                return self.side(f"{key}.shortest_edge", given["shortest_edge"])
            if given.keys() == {"height", "width"}:
                return self.side(f"{key}.height", given["height"]), self.side(f"{key}.width", given["width"])
            raise self.error(key, f"has {', '.join(given) or 'no keys'}: known are shortest_edge, or height and width")
        if isinstance(size, list) and len(size) == 2:
            return self.side(key, size[0]), self.side(key, size[1])
        side = self.side(key, size)
        return (side, side) if int_is_square else side

    def resize(self) -> int | tuple[int, int]:
        """`size`; a ViT's processor takes a bare number as both sides, and `shortest_edge` as it is."""
        if isinstance(self.get("size"), dict):
            return self.sides("size", int_is_square=False)
        return self.sides("size", self.defaults()["int_is_square"])

    def interpolation(self) -> Interpolation:
        number = self.get("resample")
        if isinstance(number, int) and not isinstance(number, bool) and number in RESAMPLE:
            return RESAMPLE[number]
        told = REFUSED_RESAMPLE.get(number, "unknown") if isinstance(number, int) else "unknown"
        known = ", ".join(f"{number} ({name})" for number, name in RESAMPLE.items())
        raise self.error("resample", f"{number!r} ({told}) is not one of {known}")
