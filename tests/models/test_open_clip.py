"""open_clip's layout: a tower and its features that open_clip 3.3.0 wrote, and there and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mlcd_ds.models.open_clip import (
    from_open_clip,
    open_clip_config,
    placeholder_text_tower,
    to_open_clip,
    towers_of_open_clip,
)
from mlcd_ds.models.text import TextConfig, TextTower
from mlcd_ds.models.vit import ViT, ViTConfig

DATA = Path(__file__).parent / "data"
CONFIG = ViTConfig(image_size=32, patch_size=8, width=48, depth=2, heads=4, mlp_width=96, embed_dim=20)


@pytest.fixture
def model() -> ViT:
    model = ViT(CONFIG)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.double().requires_grad_(False)


def test_the_features_are_open_clips() -> None:
    tower = load_file(DATA / "open_clip_tower.safetensors")
    images, features = tower.pop("images"), tower.pop("features")
    config = CONFIG.model_copy(update={"width": 32, "mlp_width": 64})
    model = ViT(config)
    model.load_state_dict(from_open_clip(tower, config))
    assert (model(images) - features).abs().max() < 1e-5
    again = to_open_clip(model.state_dict(), config)
    assert again.keys() == tower.keys() and all(torch.equal(again[name], tower[name]) for name in tower)
    joined = "visual.transformer.resblocks.0.attn.in_proj_weight"
    model.load_state_dict(from_open_clip(tower | {joined: tower[joined].roll(32, 0)}, config))  # k, q, v
    assert (model(images) - features).abs().max() > 1e-3


def test_there_and_back(model: ViT) -> None:
    state = model.state_dict()
    text = {"logit_scale": torch.ones(()), "transformer.resblocks.0.ln_1.bias": torch.ones(3)}
    again = from_open_clip(to_open_clip(state, CONFIG) | text, CONFIG)
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


def test_open_clip_loads_what_is_exported() -> None:
    """open_clip loads strictly: the same names and shapes. Its features are those of our tower, epsilon included."""
    path = DATA / "open_clip_loaded.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    config, stored = ViTConfig.model_validate_json(header["config"]), load_file(path)
    images, features = stored.pop("images"), stored.pop("features")
    model = ViT(config)
    model.load_state_dict(from_open_clip(stored, config))
    written = to_open_clip(model.state_dict(), config) | placeholder_text_tower(config.embed_dim)
    assert {name: list(tensor.shape) for name, tensor in written.items()} == json.loads(header["shapes"])
    assert not any(tensor.any() for tensor in placeholder_text_tower(20).values())
    assert (model(images) - features).abs().max() < 1e-5  # measured 1e-6
    twin = ViT(config.model_copy(update={"norm_eps": 1e-5}))  # what was exported once
    twin.load_state_dict(model.state_dict())
    assert (twin(images) - features).abs().max() > 1e-3


def test_open_clip_loads_both_towers() -> None:
    path = DATA / "open_clip_pair.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    image, text = ViTConfig.model_validate_json(header["image"]), TextConfig.model_validate_json(header["text"])
    stored = load_file(path)
    images, features, tokens, texts = (stored.pop(name) for name in ("images", "features", "tokens", "texts"))
    tower, reader = ViT(image), TextTower(text)
    tower.load_state_dict(from_open_clip(stored, image))
    reader.load_state_dict(from_open_clip(stored, text))
    written = to_open_clip(tower.state_dict(), image) | to_open_clip(reader.state_dict(), text)
    assert all(torch.equal(stored[name], tensor) for name, tensor in written.items())
    written |= {name: stored[name] for name in ("logit_scale", "logit_bias")}
    assert {name: list(tensor.shape) for name, tensor in written.items()} == json.loads(header["shapes"])
    assert (tower(images) - features).abs().max() < 1e-5  # measured 8.6e-7
    assert (reader(tokens) - texts).abs().max() < 1e-5  # measured 0
    # The known-bad twin: the token of largest number for the end, as open_clip does by default.
    twin = TextTower(text.model_copy(update={"end_token": 49}))
    twin.load_state_dict(reader.state_dict())
    assert (twin(tokens)[0] - texts[0]).abs().max() > 1e-3
    config = open_clip_config(image, text, -7.0)
    assert towers_of_open_clip(config) == (image, text)
    assert config["text_cfg"]["pool_type"] == "eos" and config["text_cfg"]["eos_id"] == 3
    assert config["init_logit_bias"] == -7.0 and "init_logit_bias" not in open_clip_config(image, text)
    largest = text.model_copy(update={"end_token": 49})
    assert open_clip_config(image, largest)["text_cfg"]["pool_type"] == "argmax"
    with pytest.raises(ValueError, match="one activation for both towers, not gelu and quick_gelu"):
        open_clip_config(image, text.model_copy(update={"activation": "quick_gelu"}))


@pytest.mark.parametrize("width", [36, 48, 384, 768, 1024, 1664])
def test_the_config_gives_the_same_shape(width: int) -> None:
    for mlp_width in (width - 1, width * 4, width * 4 + 1, 8192, 85):
        config = CONFIG.model_copy(update={"width": width, "mlp_width": mlp_width})
        written = open_clip_config(config)
        assert int(width * written["vision_cfg"]["mlp_ratio"]) == mlp_width  # as open_clip computes it
        assert width // written["vision_cfg"]["head_width"] == config.heads
    assert written["embed_dim"] == 20 and written["quick_gelu"] is True
    assert written["vision_cfg"]["layers"] == 2 and written["vision_cfg"]["norm_kwargs"] == {"eps": config.norm_eps}


def test_configs_of_open_clip_are_read_or_refused() -> None:
    released = {  # as open_clip's model_configs/ViT-B-32.json has it
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
    }
    image, text = towers_of_open_clip(released)
    assert (image.heads, image.mlp_width, image.activation, image.norm_eps) == (12, 3072, "gelu", 1e-5)
    assert (text.end_token, text.mlp_width, text.context) == (49407, 2048, 77)
    eos = {"text_cfg": {"pool_type": "eos", "eos_id": 5}}
    assert towers_of_open_clip(released | eos | {"quick_gelu": True})[1].end_token == 5
    for changes, told in (
        ({"vision_cfg": {"timm_model_name": "vit_base"}}, "vision_cfg.timm_model_name 'vit_base' of open_clip"),
        ({"vision_cfg": {"ls_init_value": 0.1}}, "vision_cfg.ls_init_value 0.1"),
        ({"text_cfg": {"hf_model_name": "roberta"}}, "text_cfg.hf_model_name 'roberta'"),
        ({"text_cfg": {"pool_type": "last"}}, "pool_type 'last'"),
        ({"text_cfg": {"norm_kwargs": {"elementwise_affine": True}}}, "norm_kwargs.elementwise_affine"),
        ({"multimodal_cfg": {"width": 1}}, "model_cfg.multimodal_cfg"),
    ):
        with pytest.raises(ValueError, match=told):
            towers_of_open_clip(released | changes)


def test_what_does_not_fit_is_named(model: ViT) -> None:
    state = to_open_clip(model.state_dict(), CONFIG)
    deeper = CONFIG.model_copy(update={"depth": 3})
    with pytest.raises(ValueError, match=r"visual\.transformer\.resblocks\.2\.ln_1\.weight is missing"):
        from_open_clip(state, deeper)
    with pytest.raises(ValueError, match=r"visual\.transformer\.resblocks\.1\..* is unexpected"):
        from_open_clip(state, CONFIG.model_copy(update={"depth": 1}))
    with pytest.raises(ValueError, match="learned positions"):
        to_open_clip(state, CONFIG.model_copy(update={"positions": "rope2d"}))
