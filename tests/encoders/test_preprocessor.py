"""Pixels as a model's own processor makes them: our reading of its file against transformers' AutoImageProcessor."""

from __future__ import annotations

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
from mlcd_ds.data.pixels import PixelFormat, clip_pixels
from mlcd_ds.encoders.preprocessor import preprocessor_config, read_pixels
from mlcd_ds.errors import UserError

SIDE = 48
SIZES = ((50, 70), (70, 50), (37, 90), (48, 48), (20, 31), (1, 40), (40, 1), (3, 2), (97, 101), (47, 49))
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
CLIP: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": SIDE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": SIDE, "width": SIDE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": MEAN,
    "image_std": STD,
    "do_convert_rgb": True,
}
OLD = {key: CLIP[key] for key in ("do_resize", "do_center_crop", "do_normalize", "image_mean", "image_std")}
SQUARE = {"height": SIDE, "width": SIDE}
FILES: dict[str, dict[str, Any]] = {
    "clip": CLIP,
    "openai's first": OLD
    | {"feature_extractor_type": "CLIPFeatureExtractor", "size": SIDE, "crop_size": SIDE, "resample": 3},
    "nothing said": {"image_mean": MEAN, "image_std": STD, "size": SIDE, "crop_size": SIDE},
    "larger, then cut": CLIP | {"size": {"shortest_edge": 60}},
    "smaller, then a rim": CLIP | {"size": {"shortest_edge": 31}},
    "stretched": CLIP | {"size": SQUARE, "do_center_crop": False},
    "stretched and cut": CLIP | {"size": {"height": 40, "width": 66}},
    "height and width as a list": CLIP | {"size": [40, 66]},
    "not resized": CLIP | {"do_resize": False},
    "bilinear": CLIP | {"resample": 2},
    "lanczos": CLIP | {"resample": 1},
    "not rescaled": CLIP | {"do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3},
    "rescaled otherwise": CLIP | {"rescale_factor": 1 / 127.5},
    "not normalised": CLIP | {"do_normalize": False},
    "one mean": CLIP | {"image_mean": 0.5, "image_std": 0.25},
    "vit": {"image_processor_type": "ViTImageProcessor", "size": SIDE, "image_mean": MEAN, "image_std": STD},
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": SQUARE, "image_mean": MEAN, "image_std": STD},
    "bit": CLIP | {"image_processor_type": "BitImageProcessor"},
    "fast": CLIP | {"image_processor_type": "CLIPImageProcessorFast"},
}


def folder_of(tmp_path: Path, content: object, name: str = "preprocessor_config.json") -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


@pytest.fixture(scope="module")
def images() -> WholeImages:
    pictures = [picture(seed, *size) for seed, size in enumerate(SIZES)]
    grey = encode(picture(99, 60, 45), "PNG", "L")
    return WholeImages([*(encode(p, "PNG") for p in pictures), grey], np.array([*SIZES, (60, 45)]))


def theirs(images: WholeImages, folder: Path) -> torch.Tensor:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    decoded = [Image.fromarray(reference.decode(content)) for content in images.images]
    return processor(decoded, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_the_processors_own(images: WholeImages, name: str, tmp_path: Path) -> None:
    """The plain loader to rounding in fp32, and DALI to half a grey level."""
    folder = folder_of(tmp_path, FILES[name])
    pixels = read_pixels(folder, SIDE)
    wanted = theirs(images, folder)
    level = 1 / torch.tensor(pixels.std)[:, None, None]
    plain = reference.load_whole(images, pixels)
    assert ((plain - wanted) / level).abs().max() < 1e-3  # measured 1e-4: they normalise in fp32
    decoder = EvaluationDecoder(len(images.images), pixels, torch.device("cpu"), 1)
    decoder.push(images)
    off = ((decoder.pop() - wanted) / level).abs().mean((1, 2, 3))
    assert off.max() < 0.5, off.tolist()  # measured 0.21


@pytest.mark.parametrize(
    "key",
    ["size", "resample", "do_resize", "do_center_crop", "do_rescale", "rescale_factor", "image_mean", "image_std"],
)
def test_every_key_counts(images: WholeImages, key: str, tmp_path: Path) -> None:
    """Known-bad twins: a file that differs in one key gives other pixels than the processor of the first."""
    changed = {
        "size": {"shortest_edge": SIDE + 1},
        "resample": 2,
        "do_resize": False,
        "do_center_crop": False,
        "do_rescale": False,
        "rescale_factor": 1 / 256,
        "image_mean": [0.5] * 3,
        "image_std": [0.3] * 3,
    }
    wanted = theirs(images, folder_of(tmp_path, CLIP))
    folder_of(tmp_path, CLIP | {key: changed[key]} | ({"size": SQUARE} if key == "do_center_crop" else {}))
    pixels = read_pixels(tmp_path, SIDE)
    assert pixels != read_pixels(folder_of(tmp_path, CLIP), SIDE)
    off = (reference.load_whole(images, pixels) - wanted).abs() * torch.tensor(clip_pixels(1).std)[:, None, None]
    assert off.mean((1, 2, 3)).max() > 0.5


def test_a_whole_processors_file_and_none_at_all(tmp_path: Path) -> None:
    assert read_pixels(tmp_path, 32) == clip_pixels(32)
    nested = CLIP | {"size": {"shortest_edge": 60}}
    folder_of(tmp_path, CLIP)
    folder_of(tmp_path, {"image_processor": nested, "processor_class": "CLIPProcessor"}, "processor_config.json")
    assert read_pixels(tmp_path, SIDE).resize == 60  # as transformers 5, which prefers it
    folder_of(tmp_path, {"processor_class": "CLIPProcessor"}, "processor_config.json")
    assert read_pixels(tmp_path, SIDE).resize == SIDE


@pytest.mark.parametrize(
    "pixels",
    [
        clip_pixels(SIDE),
        PixelFormat(SIDE, (127.0,) * 3, (128.0,) * 3, resize=SIDE + 32),
        PixelFormat(SIDE, (127.5,) * 3, (127.5,) * 3, resize=(40, 60), interpolation="lanczos"),
        PixelFormat(SIDE, (127.5,) * 3, (127.5,) * 3, resize=None),
    ],
)
def test_what_is_written_is_read_back(pixels: PixelFormat, tmp_path: Path) -> None:
    again = read_pixels(folder_of(tmp_path, preprocessor_config(pixels)), SIDE)
    assert (again.image_size, again.resize, again.interpolation) == (SIDE, pixels.resize, pixels.interpolation)
    assert np.allclose(again.mean, pixels.mean) and np.allclose(again.std, pixels.std)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "cannot be read"),
        ('{"size": ', "cannot be read"),
        ("[1, 2]", "must hold a JSON object"),
        ({key: value for key, value in CLIP.items() if key != "image_mean"}, "image_mean is missing"),
        ({key: value for key, value in CLIP.items() if key != "image_std"}, "image_std is missing"),
        (CLIP | {"image_mean": [0.5, 0.5]}, "image_mean must have three numbers"),
        (CLIP | {"image_mean": ["a", 0.5, 0.5]}, "image_mean must be a number, not 'a'"),
        (CLIP | {"image_std": [0.5, 0.5, 0.0]}, "image_std must be above zero"),
        (CLIP | {"image_std": [0.5, 0.5, float("nan")]}, "image_std must be a number"),
        (CLIP | {"rescale_factor": 0}, "rescale_factor must be above zero"),
        (CLIP | {"size": "48"}, "size must be a whole number of pixels"),
        (CLIP | {"size": {"shortest_edge": "48"}}, "size.shortest_edge must be a whole number of pixels"),
        (CLIP | {"size": {"shortest_edge": -1}}, "size.shortest_edge must be a whole number"),
        (CLIP | {"size": {"shortest_edge": 48, "longest_edge": 90}}, "size has shortest_edge, longest_edge"),
        (CLIP | {"size": {}}, "size has no keys"),
        (CLIP | {"crop_size": {"shortest_edge": 48}}, "crop_size has shortest_edge"),
        (CLIP | {"crop_size": 47}, "crop_size gives images of 47 x 47 pixels; the model takes 48 x 48"),
        (CLIP | {"size": {"height": 48, "width": 40}, "do_center_crop": False}, "size gives images of 48 x 40"),
        (CLIP | {"do_center_crop": False}, "do_center_crop is false"),
        (CLIP | {"do_resize": "yes"}, "do_resize must be true or false"),
        (CLIP | {"resample": 0}, "resample 0 (nearest) is not one of"),
        (CLIP | {"resample": 4}, "resample 4 (box) is not one of"),
        (CLIP | {"resample": 5}, "resample 5 (hamming) is not one of"),
        (CLIP | {"resample": "bicubic"}, "resample 'bicubic' (unknown) is not one of"),
        (CLIP | {"do_pad": True}, "do_pad is a step that is not known here"),
        (CLIP | {"image_processor_type": "ConvNextImageProcessor"}, "image_processor_type 'ConvNextImageProcessor'"),
    ],
)
def test_what_cannot_be_followed_is_named(content: object, told: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, content)
    with pytest.raises(UserError) as caught:
        read_pixels(folder, SIDE)
    message = str(caught.value)
    assert told in message and str(tmp_path / "preprocessor_config.json") in message and "\n" not in message
