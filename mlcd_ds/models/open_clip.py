"""Conversion between `ViT` and open_clip's image tower, and the whole model that open_clip loads. No files.

open_clip joins q, k and v into one projection, and multiplies by `proj` from the right. It loads whole models only: an
image tower goes with a text tower that is a placeholder, one tiny block of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mlcd_ds.models.vit import ViTConfig

PREFIX = "visual."
_WHOLE = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.weight": "ln_pre.weight",
    "pre_layrnorm.bias": "ln_pre.bias",
    "post_layernorm.weight": "ln_post.weight",
    "post_layernorm.bias": "ln_post.bias",
}
_IN_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")


# open_clip's own tokenizer needs this length and vocabulary.
_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
NOTE = (  # written into the files
    "An image tower. The text tower is an untrained placeholder of zeros, because open_clip loads whole models only: "
    "use model.encode_image or model.visual; encode_text gives zeros."
)


def open_clip_config(config: ViTConfig) -> dict[str, Any]:
    """A `model_cfg` of open_clip. ValueError for rotary positions, which open_clip does not have."""
    _check(config)
    ratio = config.mlp_width / config.width
    if int(config.width * ratio) < config.mlp_width:  # open_clip cuts the product
        ratio = math.nextafter(ratio, math.inf)
    return {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.activation == "quick_gelu",
        "vision_cfg": {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "width": config.width,
            "layers": config.depth,
            "head_width": config.head_dim,
            "mlp_ratio": ratio,
            "norm_kwargs": {"eps": config.norm_eps},
        },
        "text_cfg": dict(_TEXT),
    }


def placeholder_text_tower(embed_dim: int) -> dict[str, Tensor]:
    """All tensors of an open_clip model besides its image tower, as zeros: clearly not a usable text tower."""
    width, mlp_width, block = _TEXT["width"], 4 * _TEXT["width"], "transformer.resblocks.0."
    shapes = {
        "token_embedding.weight": (_TEXT["vocab_size"], width),
        "positional_embedding": (_TEXT["context_length"], width),
        "text_projection": (width, embed_dim),
        "logit_scale": (),
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


def to_open_clip(state: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """A `ViT`'s state under open_clip's keys, the projection included."""
    _check(config)
    converted = {PREFIX + theirs: state[ours] for ours, theirs in _WHOLE.items()}
    converted[PREFIX + "proj"] = state["projection.weight"].T
    for block in range(config.depth):
        ours, theirs = f"encoder.layers.{block}.", f"{PREFIX}transformer.resblocks.{block}."
        for kind in ("weight", "bias"):
            for name, other in _IN_BLOCK.items():
                converted[f"{theirs}{other}.{kind}"] = state[f"{ours}{name}.{kind}"]
            converted[f"{theirs}attn.in_proj_{kind}"] = torch.cat([state[f"{ours}{name}.{kind}"] for name in _QKV])
    return {name: tensor.detach().contiguous() for name, tensor in converted.items()}


def from_open_clip(state: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """A `ViT`'s state from open_clip's; keys that are not below `visual.` (text tower, scale) are left out.

    Raises ValueError naming a missing key, and keys below `visual.` that are not an image tower's.
    """
    _check(config)
    left = {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}

    def take(name: str) -> Tensor:
        if name not in left:
            raise ValueError(f"not an open_clip image tower of this shape: {PREFIX}{name} is missing")
        return left.pop(name)

    converted = {ours: take(theirs) for ours, theirs in _WHOLE.items()}
    converted["projection.weight"] = take("proj").T.contiguous()
    for block in range(config.depth):
        ours, theirs = f"encoder.layers.{block}.", f"transformer.resblocks.{block}."
        for kind in ("weight", "bias"):
            for name, other in _IN_BLOCK.items():
                converted[f"{ours}{name}.{kind}"] = take(f"{theirs}{other}.{kind}")
            joined = take(f"{theirs}attn.in_proj_{kind}")
            converted |= {f"{ours}{name}.{kind}": part for name, part in zip(_QKV, joined.chunk(3), strict=True)}
    if left:
        raise ValueError(f"not an open_clip image tower of this shape: {PREFIX}{sorted(left)[0]} is unexpected")
    return converted


def _check(config: ViTConfig) -> None:
    if config.positions != "learned":
        raise ValueError(
            "open_clip's image tower has learned positions; this model's are rotary: export to Hugging Face"
        )
