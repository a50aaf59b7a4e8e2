"""Models in Hugging Face folders: CLIP and MLCD image towers, CLIP's text tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlcd_ds.data.pixels import CLIP_MEAN, CLIP_STD, PixelFormat
from mlcd_ds.encoders.base import Encoder, TextEncoder
from mlcd_ds.errors import UserError


def hugging_face(folder: Path, size: int | None) -> Encoder:
    """A CLIP, CLIP vision or MLCD model: image embeddings where there is a projection, else the pooled output."""
    import transformers

    config = json.loads((folder / "config.json").read_text())
    kind = config.get("model_type")
    classes = {
        "clip": transformers.CLIPVisionModelWithProjection,
        "clip_vision_model": transformers.CLIPVisionModel,
        "mlcd": transformers.MLCDVisionModel,
        "mlcd_vision_model": transformers.MLCDVisionModel,
    }
    if kind not in classes:
        raise UserError(f"{folder / 'config.json'}: model_type {kind!r} is not one of {', '.join(classes)}.")
    network = _from_pretrained(classes[kind], folder)
    mean, std = CLIP_MEAN, CLIP_STD
    if (folder / "preprocessor_config.json").exists():
        image = json.loads((folder / "preprocessor_config.json").read_text())
        mean, std = (tuple(255 * value for value in image[key]) for key in ("image_mean", "image_std"))
    trained = network.config.vision_config if hasattr(network.config, "vision_config") else network.config
    if size not in (None, trained.image_size):
        raise UserError(f"{folder} takes images of {trained.image_size} pixels, not {size}.")

    def encode(images: Tensor) -> Tensor:
        output = network(pixel_values=images)
        return output.image_embeds if hasattr(output, "image_embeds") else output.pooler_output

    return Encoder(folder.resolve().name, PixelFormat(trained.image_size, mean, std), network, encode)


def load_text_encoder(folder: Path) -> TextEncoder:
    """The text half of a CLIP model with its tokenizer, from a Hugging Face folder. Captions are cut at its length."""
    import transformers

    path = folder / "config.json"
    if not path.exists() or json.loads(path.read_text()).get("model_type") != "clip":
        raise UserError(f"{folder} is not the folder of a whole CLIP model (model_type clip): only such encode texts.")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no tokenizer that can be read: {str(error).splitlines()[0]}") from None
    network = _from_pretrained(transformers.CLIPTextModelWithProjection, folder)
    length = network.config.max_position_embeddings

    def encode(captions: list[str]) -> Tensor:
        tokens = tokenizer(captions, padding=True, truncation=True, max_length=length, return_tensors="pt")
        inputs = {name: tokens[name].to(network.device) for name in ("input_ids", "attention_mask")}
        return network(**inputs).text_embeds

    return TextEncoder(folder.resolve().name, network.eval().requires_grad_(False), encode)


def _from_pretrained(kind: Any, folder: Path) -> nn.Module:
    """A model of transformers in fp32. UserError where the folder has not all of its weights."""
    network, info = kind.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32
    )
    if info["missing_keys"]:
        raise UserError(f"{folder}: the weights lack {sorted(info['missing_keys'])[:3]}: no whole {kind.__name__}.")
    return network
