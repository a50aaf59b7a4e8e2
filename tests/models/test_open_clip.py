"""open_clip's layout: a tower and its features that open_clip 3.3.0 wrote, and there and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlcd_ds.models.open_clip import from_open_clip, open_clip_config, to_open_clip
from mlcd_ds.models.vit import ViT, ViTConfig

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
    tower = load_file(Path(__file__).parent / "data/open_clip_tower.safetensors")
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
    config = open_clip_config(CONFIG)
    assert config["embed_dim"] == 20 and config["quick_gelu"] is True
    assert config["vision_cfg"]["layers"] == 2 and config["vision_cfg"]["head_width"] == 12


def test_what_does_not_fit_is_named(model: ViT) -> None:
    state = to_open_clip(model.state_dict(), CONFIG)
    deeper = CONFIG.model_copy(update={"depth": 3})
    with pytest.raises(ValueError, match=r"visual\.transformer\.resblocks\.2\.ln_1\.weight is missing"):
        from_open_clip(state, deeper)
    with pytest.raises(ValueError, match=r"visual\.transformer\.resblocks\.1\..* is unexpected"):
        from_open_clip(state, CONFIG.model_copy(update={"depth": 1}))
    with pytest.raises(ValueError, match="rotary"):
        to_open_clip(state, CONFIG.model_copy(update={"positions": "rope2d"}))
