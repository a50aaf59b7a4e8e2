"""Conversion between `ViT` and open_clip's image tower: the keys below `visual.`, and the tower's config. No files.

open_clip joins q, k and v into one projection, and multiplies by `proj` from the right.
"""

from __future__ import annotations

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


def open_clip_config(config: ViTConfig) -> dict[str, Any]:
    """The image part of an open_clip model config. ValueError for rotary positions, which open_clip does not have."""
    _check(config)
    return {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.activation == "quick_gelu",
        "vision_cfg": {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "width": config.width,
            "layers": config.depth,
            "head_width": config.head_dim,
            "mlp_ratio": config.mlp_width / config.width,
        },
    }


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
