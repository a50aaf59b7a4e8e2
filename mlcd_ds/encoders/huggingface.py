"""Models in Hugging Face folders: CLIP and MLCD image towers, CLIP's text tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlcd_ds.artefacts.readers import decoding, read_json_object
from mlcd_ds.encoders.base import Encoder, TextEncoder
from mlcd_ds.encoders.preprocessor import read_pixels
from mlcd_ds.errors import UserError

FIX = "Take the files of the model's own release, or export the run again."


def hugging_face(folder: Path, size: int | None) -> Encoder:
    """A CLIP, CLIP vision or MLCD model: image embeddings where there is a projection, else the pooled output."""
    import transformers

    kind = model_type(folder)
    classes = {
        "clip": transformers.CLIPVisionModelWithProjection,
        "clip_vision_model": transformers.CLIPVisionModel,
        "mlcd": transformers.MLCDVisionModel,
        "mlcd_vision_model": transformers.MLCDVisionModel,
    }
    if kind not in classes:
        raise UserError(f"{folder / 'config.json'}: model_type {kind} is not one of {', '.join(classes)}. {FIX}")
    network = _from_pretrained(classes[kind], folder)
    config: Any = network.config
    trained = getattr(config, "vision_config", config)
    if size not in (None, trained.image_size):
        raise UserError(f"{folder} takes images of {trained.image_size} pixels, not {size}.")
    pixels = read_pixels(folder, trained.image_size)

    def encode(images: Tensor) -> Tensor:
        output = network(pixel_values=images)
        return output.image_embeds if hasattr(output, "image_embeds") else output.pooler_output

    return Encoder(folder.resolve().name, pixels, network, encode)


def load_text_encoder(folder: Path) -> TextEncoder:
    """The text half of a CLIP model with its tokenizer, from a Hugging Face folder. Captions are cut at its length."""
    import transformers

    if not (folder / "config.json").exists() or model_type(folder) != "clip":
        raise UserError(f"{folder} is not the folder of a whole CLIP model (model_type clip): only such encode texts.")
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"{folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt). {FIX}")
    with decoding(f"{folder}: its tokenizer", FIX):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    network = _from_pretrained(transformers.CLIPTextModelWithProjection, folder)
    config: Any = network.config
    length = config.max_position_embeddings
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens, and the text tower {config.vocab_size}: they belong "
            f"to different models. {FIX}"
        )

    def encode(captions: list[str]) -> Tensor:
        tokens = tokenizer(captions, padding=True, truncation=True, max_length=length, return_tensors="pt")
        inputs = {name: tokens[name].to(network.device) for name in ("input_ids", "attention_mask")}
        return network(**inputs).text_embeds

    return TextEncoder(folder.resolve().name, network.eval().requires_grad_(False), encode)


def model_type(folder: Path) -> str:
    """What config.json says the model is."""
    return str(read_json_object(folder / "config.json", FIX).get("model_type"))


def _from_pretrained(kind: Any, folder: Path) -> nn.Module:
    """A model of transformers in fp32. UserError where the folder lacks some of its weights or has other shapes."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it would print about the weights what is checked below
    logging.disable_progress_bar()  # of a second's work, also where nobody watches
    try:
        with decoding(f"{folder}: the model (config.json, model.safetensors)", FIX):
            network, info = kind.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                dtype=torch.float32,
            )
    finally:
        logging.set_verbosity(verbosity)
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise UserError(
            f"{folder}: {name} is {list(found)} in model.safetensors, and {list(wanted)} by config.json. {FIX}"
        )
    if info["missing_keys"]:
        lacking = sorted(info["missing_keys"])[:3]
        raise UserError(f"{folder}: the weights lack {lacking}: no whole {kind.__name__}. {FIX}")
    return network
