"""Conversion between our towers and open_clip's `CLIP`, and the whole model that open_clip loads. No files.

open_clip joins q, k and v into one projection, and multiplies by its projections from the right. It loads whole models
only: an image tower alone goes with a text tower that is a placeholder, one tiny block of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlcd_ds.models.text import TextConfig
from mlcd_ds.models.vit import ViTConfig


@dataclass(frozen=True)
class _Names:
    """What a tower's parameters outside its blocks are called: ours -> theirs; and what all of theirs begin with."""

    prefix: str
    whole: Mapping[str, str]
    projection: str


_IMAGE = _Names(
    prefix="visual.",
    whole={
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "pre_layrnorm.weight": "ln_pre.weight",
        "pre_layrnorm.bias": "ln_pre.bias",
        "post_layernorm.weight": "ln_post.weight",
        "post_layernorm.bias": "ln_post.bias",
    },
    projection="proj",
)
_TEXT = _Names(
    prefix="",
    whole={
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    },
    projection="text_projection",
)
_IN_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
LOG_SCALE, BIAS = "logit_scale", "logit_bias"
CONFIG_NAME, WEIGHTS_NAME = "open_clip_config.json", "open_clip_model.safetensors"  # the names it looks for
_SCALES = (LOG_SCALE, BIAS)

# open_clip's own tokenizer needs this length and vocabulary.
_PLACEHOLDER = {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
NOTE = (  # written into the files
    "An image tower. The text tower is an untrained placeholder of zeros, because open_clip loads whole models only: "
    "use model.encode_image or model.visual; encode_text gives zeros."
)


def open_clip_problem(image: ViTConfig, text: TextConfig | None) -> str | None:
    """Why open_clip has no such model; None where it has."""
    if image.positions != "learned" or image.num_registers:
        return "open_clip's image tower has learned positions and no registers"
    if text and text.activation != image.activation:
        return f"open_clip has one activation for both towers, not {image.activation} and {text.activation}"
    return None


def open_clip_config(image: ViTConfig, text: TextConfig | None = None, bias: float | None = None) -> dict[str, Any]:
    """A `model_cfg` of open_clip; without `text` for an image tower and a placeholder. `bias`: SigLIP's summand.

    Raises ValueError where open_clip has no such model.
    """
    _check(image, text)
    return {
        "embed_dim": image.embed_dim,
        "quick_gelu": image.activation == "quick_gelu",
        **({} if bias is None else {"init_logit_bias": bias}),
        "vision_cfg": {
            "image_size": image.image_size,
            "patch_size": image.patch_size,
            "head_width": image.head_dim,
            **_shape(image),
        },
        "text_cfg": dict(_PLACEHOLDER) if text is None else _text_config(text),
    }


def _shape(config: ViTConfig | TextConfig) -> dict[str, Any]:
    """What both towers' sections say alike."""
    ratio, norm = mlp_ratio(config.width, config.mlp_width), {"eps": config.norm_eps}
    return {"width": config.width, "layers": config.depth, "mlp_ratio": ratio, "norm_kwargs": norm}


def mlp_ratio(width: int, mlp_width: int) -> float:
    """The number by which open_clip and timm multiply a width: they cut the product to a whole number."""
    ratio = mlp_width / width
    return math.nextafter(ratio, math.inf) if int(width * ratio) < mlp_width else ratio


def _text_config(config: TextConfig) -> dict[str, Any]:
    pooling: dict[str, Any] = {"pool_type": "argmax"}  # by the largest number, as every version of open_clip knows
    if config.end_token != config.vocab_size - 1:
        pooling = {"pool_type": "eos", "eos_id": config.end_token}
    return {
        "context_length": config.context,
        "vocab_size": config.vocab_size,
        "heads": config.heads,
        **_shape(config),
        **pooling,
    }


# open_clip leaves fields at their default out of its configs.
_VISION_DEFAULTS = {"layers": 12, "width": 768, "head_width": 64, "patch_size": 16, "image_size": 224}
_TEXT_DEFAULTS = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
_BOTH_DEFAULTS: dict[str, Any] = {"mlp_ratio": 4.0, "norm_kwargs": None}
_OF_TOKENIZERS = {"hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "pad_id"}


def towers_of_open_clip(model_cfg: Mapping[str, Any]) -> tuple[ViTConfig, TextConfig]:
    """The towers' shapes that a `model_cfg` describes. Raises ValueError naming a key that our towers cannot follow."""
    known = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "init_logit_scale", "init_logit_bias", "custom_text"}
    _check_known(model_cfg, known, "model_cfg")
    vision = {**_VISION_DEFAULTS, **_BOTH_DEFAULTS, **model_cfg["vision_cfg"]}
    text = {**_TEXT_DEFAULTS, **_BOTH_DEFAULTS, "pool_type": "argmax", "eos_id": 2, **model_cfg["text_cfg"]}
    _check_known(vision, {*_VISION_DEFAULTS, *_BOTH_DEFAULTS}, "vision_cfg")
    _check_known(text, {*_TEXT_DEFAULTS, *_BOTH_DEFAULTS, *_OF_TOKENIZERS, "pool_type", "eos_id"}, "text_cfg")
    if text["pool_type"] not in ("argmax", "eos"):
        raise ValueError(f"text_cfg.pool_type {text['pool_type']!r}: only argmax and eos can be converted")
    shared = {
        "embed_dim": model_cfg["embed_dim"],
        "activation": "quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
    }

    def shape(section: Mapping[str, Any]) -> dict[str, Any]:
        norm = section["norm_kwargs"] or {}
        _check_known(norm, {"eps"}, "norm_kwargs")
        mlp_width = int(section["width"] * section["mlp_ratio"])
        sizes = {"width": section["width"], "depth": section["layers"], "mlp_width": mlp_width}
        return {**shared, **sizes, "norm_eps": norm.get("eps", 1e-5)}

    heads = vision["width"] // vision["head_width"]
    image = ViTConfig(image_size=vision["image_size"], patch_size=vision["patch_size"], heads=heads, **shape(vision))
    end_token = text["eos_id"] if text["pool_type"] == "eos" else text["vocab_size"] - 1
    sizes = {"vocab_size": text["vocab_size"], "context": text["context_length"], "heads": text["heads"]}
    return image, TextConfig(end_token=end_token, **sizes, **shape(text))


def _check_known(section: Mapping[str, Any], known: set[str], name: str) -> None:
    """Raise ValueError naming a key that asks for something else."""
    if extra := sorted(key for key in section.keys() - known if section[key]):
        raise ValueError(f"{name}.{extra[0]} {section[extra[0]]!r} of open_clip has no counterpart in our towers")


def placeholder_text_tower(embed_dim: int) -> dict[str, Tensor]:
    """All tensors of an open_clip model besides its image tower, as zeros: clearly not a usable text tower."""
    width, mlp_width, block = _PLACEHOLDER["width"], 4 * _PLACEHOLDER["width"], "transformer.resblocks.0."
    shapes = {
        "token_embedding.weight": (_PLACEHOLDER["vocab_size"], width),
        "positional_embedding": (_PLACEHOLDER["context_length"], width),
        "text_projection": (width, embed_dim),
        LOG_SCALE: (),
        block + "attn.in_proj_weight": (3 * width, width),
        block + "attn.in_proj_bias": (3 * width,),
        block + "attn.out_proj.weight": (width, width),
        block + "mlp.c_fc.weight": (mlp_width, width),
        block + "mlp.c_fc.bias": (mlp_width,),
        block + "mlp.c_proj.weight": (width, mlp_width),
    }
    vectors = ("ln_final.weight", "ln_final.bias", *(f"{block}ln_{n}.{k}" for n in (1, 2) for k in ("weight", "bias")))
    shapes |= dict.fromkeys((*vectors, block + "attn.out_proj.bias", block + "mlp.c_proj.bias"), (width,))
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def to_open_clip(state: Mapping[str, Tensor], config: ViTConfig | TextConfig) -> dict[str, Tensor]:
    """A tower's state under open_clip's keys, the projection included."""
    names = _names(config)
    converted = {theirs: state[ours] for ours, theirs in names.whole.items()}
    converted[names.projection] = state["projection.weight"].T
    for block in range(config.depth):
        ours, theirs = f"encoder.layers.{block}.", f"transformer.resblocks.{block}."
        for kind in ("weight", "bias"):
            for name, other in _IN_BLOCK.items():
                converted[f"{theirs}{other}.{kind}"] = state[f"{ours}{name}.{kind}"]
            converted[f"{theirs}attn.in_proj_{kind}"] = torch.cat([state[f"{ours}{name}.{kind}"] for name in _QKV])
    return {names.prefix + name: tensor.detach().contiguous() for name, tensor in converted.items()}


def from_open_clip(state: Mapping[str, Tensor], config: ViTConfig | TextConfig) -> dict[str, Tensor]:
    """A tower's state from that of a whole model of open_clip; the other tower's keys and the scale are left out.

    Raises ValueError naming a missing key, and keys that are not such a tower's.
    """
    names = _names(config)
    kind_of_tower = "an image" if names is _IMAGE else "a text"
    left = {
        name.removeprefix(names.prefix): tensor
        for name, tensor in state.items()
        if name.startswith(_IMAGE.prefix) == (names is _IMAGE) and name not in _SCALES
    }

    def take(name: str) -> Tensor:
        if name not in left:
            raise ValueError(f"not {kind_of_tower} tower of this shape in open_clip: {names.prefix}{name} is missing")
        return left.pop(name)

    converted = {ours: take(theirs) for ours, theirs in names.whole.items()}
    converted["projection.weight"] = take(names.projection).T.contiguous()
    for block in range(config.depth):
        ours, theirs = f"encoder.layers.{block}.", f"transformer.resblocks.{block}."
        for kind in ("weight", "bias"):
            for name, other in _IN_BLOCK.items():
                converted[f"{ours}{name}.{kind}"] = take(f"{theirs}{other}.{kind}")
            joined = take(f"{theirs}attn.in_proj_{kind}")
            converted |= {f"{ours}{name}.{kind}": part for name, part in zip(_QKV, joined.chunk(3), strict=True)}
    if left:
        extra = names.prefix + sorted(left)[0]
        raise ValueError(f"not {kind_of_tower} tower of this shape in open_clip: {extra} is unexpected")
    return converted


def _names(config: ViTConfig | TextConfig) -> _Names:
    if isinstance(config, TextConfig):
        return _TEXT
    _check(config, None)
    return _IMAGE


def _check(image: ViTConfig, text: TextConfig | None) -> None:
    if problem := open_clip_problem(image, text):
        raise ValueError(f"{problem}: export to Hugging Face")
