"""Models in Hugging Face folders: CLIP and MLCD image towers, CLIP's text tower, language models.

B texts, T tokens, D width.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlcd_ds.artefacts.readers import decoding, read_json_object
from mlcd_ds.encoders.base import Encoder, TextEncoder
from mlcd_ds.encoders.preprocessor import read_pixels
from mlcd_ds.errors import UserError

IMAGE_TYPES = ("clip", "clip_vision_model", "mlcd", "mlcd_vision_model")
"""Values of model_type of models that take images."""
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
    config = network.config
    trained = getattr(config, "vision_config", config)
    if size not in (None, trained.image_size):
        raise UserError(f"{folder} takes images of {trained.image_size} pixels, not {size}.")
    pixels = read_pixels(folder, trained.image_size)

    def encode(images: Tensor) -> Tensor:
        output = network(pixel_values=images)
        return output.image_embeds if hasattr(output, "image_embeds") else output.pooler_output

    return Encoder(folder.resolve().name, pixels, network, encode)


def is_language_model(folder: Path) -> bool:
    """Whether a folder is that of a model of texts alone."""
    return os.path.exists(folder / "config.json") and model_type(folder) not in IMAGE_TYPES  # False for a long name


def load_text_encoder(folder: Path) -> TextEncoder:
    """From a Hugging Face folder with a tokenizer: the text half of a CLIP model, or a language model (BERT, RoBERTa;
    also a decoder), of which the mean of the last hidden states is taken. Captions are cut at its length."""
    import transformers

    if not is_language_model(folder) and not ((folder / "config.json").exists() and model_type(folder) == "clip"):
        raise UserError(
            f"{folder} is not the folder of a whole CLIP model (model_type clip), nor of a language model: only such "
            "encode texts."
        )
    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        raise UserError(f"{folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt). {FIX}")
    with decoding(f"{folder}: its tokenizer", FIX):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if is_language_model(folder):
        network = _from_pretrained(transformers.AutoModel, folder, unused="pooler.")
        if hasattr(network, "pooler"):  # random numbers, in models that were trained to fill in words
            network.pooler = None
        if network.config.is_encoder_decoder:
            raise UserError(f"{folder}: {model_type(folder)} models translate texts; take one that only encodes them.")
        if tokenizer.pad_token is None:  # decoders have none; what it is does not matter, as it is masked
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token is None:
            raise UserError(f"{folder}: its tokenizer has neither a padding nor an end token. {FIX}")
        length = _max_length(network, tokenizer)
    else:
        network = _from_pretrained(transformers.CLIPTextModelWithProjection, folder)
        length = network.config.max_position_embeddings
    config = network.config
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens, and the text tower {config.vocab_size}: they belong "
            f"to different models. {FIX}"
        )

    def encode(captions: list[str]) -> Tensor:
        tokens = tokenizer(captions, padding=True, truncation=True, max_length=length, return_tensors="pt")
        inputs = {name: tokens[name].to(network.device) for name in ("input_ids", "attention_mask")}
        output = network(**inputs)
        return output.text_embeds if hasattr(output, "text_embeds") else _mean(output, inputs["attention_mask"])

    return TextEncoder(folder.resolve().name, network.eval().requires_grad_(False), encode)


def _mean(output: Any, mask_BT: Tensor) -> Tensor:
    """[B, D]: of the last hidden states, over the tokens that are no padding."""
    weights_BT1 = mask_BT[:, :, None].to(output.last_hidden_state.dtype)
    return (output.last_hidden_state * weights_BT1).sum(dim=1) / weights_BT1.sum(dim=1)


def _max_length(network: Any, tokenizer: Any) -> int:
    """Most tokens of a text for a language model."""
    positions = getattr(network.config, "max_position_embeddings", tokenizer.model_max_length)
    table: Any = getattr(getattr(network, "embeddings", None), "position_embeddings", None)
    if getattr(table, "padding_idx", None) is not None:  # RoBERTa counts positions from behind that of padding
        positions -= table.padding_idx + 1
    return min(positions, tokenizer.model_max_length)


def model_type(folder: Path) -> str:
    """What config.json says the model is."""
    return str(read_json_object(folder / "config.json", FIX).get("model_type"))


def _from_pretrained(kind: Any, folder: Path, unused: str | None = None) -> Any:
    """A model of transformers in fp32. UserError where the folder lacks some of its weights, but for those whose names
    begin with `unused`, or has other shapes."""
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
    missing = [name for name in info["missing_keys"] if unused is None or not name.startswith(unused)]
    if missing:
        lacking = sorted(missing)[:3]
        raise UserError(f"{folder}: the weights lack {lacking}: no whole {kind.__name__}. {FIX}")
    return network
