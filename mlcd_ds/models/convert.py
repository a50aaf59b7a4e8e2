"""Conversion between `ViT` and Hugging Face's `CLIPVisionModel` and `MLCDVisionModel`, and between both towers and
`CLIPModel`: keys and config only, no files, no transformers.

Our towers use Hugging Face's parameter names, so that a conversion is a prefix and a check; the projections have other
names, and an image tower alone leaves its own out.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mlcd_ds.models.rope import THETA
from mlcd_ds.models.text import TextConfig, TextTower
from mlcd_ds.models.vit import ViT, ViTConfig

PREFIX, TEXT_PREFIX = "vision_model.", "text_model."
PROJECTION = "projection."
# What both towers' parameters are called in a `CLIPModel`, by our prefix; the longest that fits counts.
CLIP_PREFIXES = {
    "image": {PROJECTION: "visual_projection.", "": PREFIX},
    "text": {PROJECTION: "text_projection.", "": TEXT_PREFIX},
}
LOG_SCALE = "logit_scale"
BIAS = "logit_bias"  # SigLIP's summand: a key of config.json that is ours, as a CLIPModel does not add it
ROTARY, CLASS_ANGLES = "rotary.", "class_pos_emb"  # ours is a part of the rotary module

# transformers leaves fields at their default out of some config.json files
_CLIP_VISION_DEFAULTS: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 32,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "num_channels": 3,
}
_MLCD_VISION_DEFAULTS: dict[str, Any] = _CLIP_VISION_DEFAULTS | {
    "image_size": 336,
    "patch_size": 14,
    "hidden_size": 1664,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "intermediate_size": 8192,
    "hidden_act": "gelu",
    "num_key_value_groups": 1,
}
_CLIP_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
# In configs of before: not the token's number, but a sign that the text ends at its token of largest number.
LEGACY_END_TOKEN = 2
MLCD_TYPES = ("mlcd", "mlcd_vision_model")
_IGNORED_KEYS = frozenset({"logit_scale", "text_projection.weight", "visual_projection.weight"})


# What both towers' configs share: our name, and Hugging Face's.
_SHAPE = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "embed_dim": "projection_dim",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
}


def _hf_shape(config: ViTConfig | TextConfig) -> dict[str, Any]:
    """The part of a Hugging Face config that both towers have, and no dropout."""
    return {theirs: getattr(config, ours) for ours, theirs in _SHAPE.items()} | {"attention_dropout": 0.0}


def _shape(hf_config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The same part read back; a whole CLIP model's config has the projection's width at its top."""
    found = {ours: values[theirs] for ours, theirs in _SHAPE.items()}
    return found | {"embed_dim": hf_config.get("projection_dim", found["embed_dim"])}


def vision_config(config: ViTConfig) -> dict[str, Any]:
    """Return the contents of a `config.json` with which transformers builds this model: `CLIPVisionModel` where
    positions are learned, `MLCDVisionModel` where they are rotary (transformers 4.52 and later)."""
    if config.positions == "rope2d":
        # "mlcd" and not "mlcd_vision_model": AutoModel of transformers 4 and 5 knows the former.
        kind = {"architectures": ["MLCDVisionModel"], "model_type": "mlcd", "num_key_value_groups": 1}
        kind["rope_parameters"] = {"rope_type": "axial", "rope_theta": THETA}
    else:
        kind = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
    return {
        **kind,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        **_hf_shape(config),
    }


def to_vision_model(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a `ViT`'s state under Hugging Face's keys, contiguous, the loss's projection left out.

    Every key has the `vision_model.` prefix: transformers 4 loads a file without it with random weights and a warning.
    """
    return {
        PREFIX + name.removeprefix(ROTARY): tensor.detach().contiguous()
        for name, tensor in state_dict.items()
        if not name.startswith(PROJECTION)
    }


def from_vision_model(
    state_dict: Mapping[str, Tensor], hf_config: Mapping[str, Any]
) -> tuple[ViTConfig, dict[str, Tensor]]:
    """Return the config and the state of the `ViT` that equals a `CLIPVisionModel`, a `CLIPModel`'s vision half or an
    `MLCDVisionModel`.

    Keys may have the `vision_model.` prefix or not. Left out: `embeddings.position_ids` (a buffer that older versions
    saved), `text_model.*`, `text_projection.weight`, `visual_projection.weight` and `logit_scale`. The state has no
    projection: load it with `strict=False` into a model that was initialised, or add one.

    Raises ValueError naming any other key that is unexpected or missing, a shape that differs from the config's, and
    config values that `ViT` cannot represent.
    """
    config = _vit_config(hf_config)
    state: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        name = key.removeprefix(PREFIX)
        if key in _IGNORED_KEYS or key.startswith("text_model.") or name == "embeddings.position_ids":
            continue
        if name in state:
            raise ValueError(f"key {name!r} is there twice, with the prefix {PREFIX!r} and without")
        if name == CLASS_ANGLES:
            name = ROTARY + name
        state[name] = tensor
    _check_against_model(state, config)
    return config, state


def _vit_config(hf_config: Mapping[str, Any]) -> ViTConfig:
    """Read a `CLIPVisionConfig`, or the `vision_config` inside a `CLIPConfig`."""
    model_type = hf_config.get("model_type")
    if model_type not in ("clip", "clip_vision_model", *MLCD_TYPES):
        raise ValueError(
            f"model_type {model_type!r} in the config; 'clip', 'clip_vision_model', 'mlcd' and 'mlcd_vision_model' can "
            "be converted"
        )
    is_rotary = model_type in MLCD_TYPES
    values = dict(_MLCD_VISION_DEFAULTS if is_rotary else _CLIP_VISION_DEFAULTS)
    values.update(hf_config.get("vision_config") or {} if model_type == "clip" else hf_config)
    if values["num_channels"] != 3:
        raise ValueError(f"num_channels {values['num_channels']} in the config; ViT takes 3")
    if is_rotary and (values["num_key_value_groups"] != 1 or _theta(values) != THETA):
        raise ValueError(f"num_key_value_groups and rope_theta in the config must be 1 and {THETA:.0f}")
    return ViTConfig(
        image_size=values["image_size"],
        patch_size=values["patch_size"],
        positions="rope2d" if is_rotary else "learned",
        **_shape(hf_config, values),
    )


def _theta(values: Mapping[str, Any]) -> float:
    return (values.get("rope_parameters") or {}).get("rope_theta", values.get("rope_theta", THETA))


def _check_against_model(state: Mapping[str, Tensor], config: ViTConfig) -> None:
    """Raise ValueError unless the state has exactly the keys and shapes of a `ViT` without its projection."""
    with torch.device("meta"):
        expected = {
            name: tensor.shape for name, tensor in ViT(config).state_dict().items() if not name.startswith(PROJECTION)
        }
    _check_keys(state, expected, "vision")


def _check_keys(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size], kind: str) -> None:
    """Raise ValueError unless the state has exactly these keys and shapes."""
    unexpected, missing = sorted(state.keys() - expected.keys()), sorted(expected.keys() - state.keys())
    if unexpected or missing:
        raise ValueError(f"not the keys of this {kind} model: unexpected {unexpected}, missing {missing}")
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}; the config makes it {tuple(shape)}")


def text_config(config: TextConfig, start_token: int | None = None) -> dict[str, Any]:
    """Return the `text_config` of a `CLIPConfig`, or a `CLIPTextConfig`, with which transformers builds this tower.

    `start_token`: the tokenizer's, where it has one. Padding is the end token again.
    """
    return {
        "model_type": "clip_text_model",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "bos_token_id": start_token,
        "eos_token_id": config.end_token,
        "pad_token_id": config.end_token,
        **_hf_shape(config),
    }


def clip_problem(image: ViTConfig, text: TextConfig) -> str | None:
    """Why transformers has no `CLIPModel` of these towers; None where it has."""
    if image.positions != "learned" or image.num_registers:
        return "a CLIPModel has learned positions and no registers: this image tower cannot be part of one"
    if image.embed_dim != text.embed_dim:
        return f"image and text embeddings have {image.embed_dim} and {text.embed_dim} channels: not one"
    if text.end_token == LEGACY_END_TOKEN != text.vocab_size - 1:
        return (
            f"the end token has number {LEGACY_END_TOKEN}, which a CLIPModel takes for a sign that texts end at their "
            "token of largest number"
        )
    return None


def clip_config(
    image: ViTConfig, text: TextConfig, start_token: int | None = None, bias: float | None = None
) -> dict[str, Any]:
    """Return the contents of a `config.json` with which transformers builds a `CLIPModel`. `bias`: SigLIP's summand.

    Raises ValueError where the towers do not fit together, or CLIP has no such tower.
    """
    if problem := clip_problem(image, text):
        raise ValueError(problem)
    vision = {key: value for key, value in vision_config(image).items() if key != "architectures"}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": image.embed_dim,
        **({} if bias is None else {BIAS: bias}),
        "vision_config": vision,
        "text_config": text_config(text, start_token),
    }


def to_clip_model(image: Mapping[str, Tensor], text: Mapping[str, Tensor], log_scale: Tensor) -> dict[str, Tensor]:
    """Return the state of both towers under `CLIPModel`'s keys, contiguous. `log_scale`: the logarithm of the factor on
    cosines, a number."""
    state = {LOG_SCALE: log_scale.detach().reshape(()).contiguous()}
    for tower, tensors in (("image", image), ("text", text)):
        for name, tensor in tensors.items():
            ours = next(prefix for prefix in CLIP_PREFIXES[tower] if name.startswith(prefix))
            state[CLIP_PREFIXES[tower][ours] + name.removeprefix(ours)] = tensor.detach().contiguous()
    return state


def from_text_model(
    state_dict: Mapping[str, Tensor], hf_config: Mapping[str, Any]
) -> tuple[TextConfig, dict[str, Tensor]]:
    """Return the config and the whole state of the `TextTower` that equals a `CLIPTextModelWithProjection`, or a
    `CLIPModel`'s text half.

    Left out: `text_model.embeddings.position_ids` (a buffer that older versions saved), `vision_model.*`,
    `visual_projection.weight` and `logit_scale`. Raises ValueError naming any other key that is unexpected or missing,
    a shape that differs from the config's, and a config of another model.
    """
    config = _text_config(hf_config)
    prefixes = {theirs: ours for ours, theirs in CLIP_PREFIXES["text"].items()}
    state: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        if key.startswith((PREFIX, "visual_projection.")) or key in (
            LOG_SCALE,
            TEXT_PREFIX + "embeddings.position_ids",
        ):
            continue
        theirs = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
        state[prefixes.get(theirs, "") + key.removeprefix(theirs)] = tensor
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in TextTower(config).state_dict().items()}
    _check_keys(state, expected, "text")
    return config, state


def _text_config(hf_config: Mapping[str, Any]) -> TextConfig:
    """Read a `CLIPTextConfig`, or the `text_config` inside a `CLIPConfig`."""
    model_type = hf_config.get("model_type")
    if model_type not in ("clip", "clip_text_model"):
        raise ValueError(f"model_type {model_type!r} in the config; 'clip' and 'clip_text_model' have a text tower")
    values = dict(_CLIP_TEXT_DEFAULTS)
    values.update(hf_config.get("text_config") or {} if model_type == "clip" else hf_config)
    end_token = values["eos_token_id"]
    return TextConfig(
        vocab_size=values["vocab_size"],
        context=values["max_position_embeddings"],
        end_token=values["vocab_size"] - 1 if end_token == LEGACY_END_TOKEN else end_token,
        **_shape(hf_config, values),
    )
