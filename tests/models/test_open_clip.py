"""open_clip's layout: computed with torch's own joined attention, there and back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlcd_ds.models.layers import activate
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


def open_clip_forward(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The tower as open_clip describes it: a convolution, torch's multi-head attention, a product with `proj`."""
    w = {name.removeprefix("visual."): tensor for name, tensor in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    x = F.conv2d(images, w["conv1.weight"], stride=CONFIG.patch_size).flatten(2).transpose(1, 2)
    x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x], dim=1) + w["positional_embedding"]
    x = norm(x, "ln_pre").transpose(0, 1)
    for block in range(CONFIG.depth):
        name = f"transformer.resblocks.{block}"
        y = norm(x, f"{name}.ln_1")
        in_proj = w[f"{name}.attn.in_proj_weight"], w[f"{name}.attn.in_proj_bias"]
        out_proj = w[f"{name}.attn.out_proj.weight"], w[f"{name}.attn.out_proj.bias"]
        args = (y, y, y, CONFIG.width, CONFIG.heads, *in_proj, None, None, False, 0.0, *out_proj)
        x = x + F.multi_head_attention_forward(*args, training=False, need_weights=False)[0]
        y = F.linear(norm(x, f"{name}.ln_2"), w[f"{name}.mlp.c_fc.weight"], w[f"{name}.mlp.c_fc.bias"])
        y = activate(y, CONFIG.activation)
        x = x + F.linear(y, w[f"{name}.mlp.c_proj.weight"], w[f"{name}.mlp.c_proj.bias"])
    return norm(x[0], "ln_post") @ w["proj"]


def test_the_tower_computes_the_same(model: ViT) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    state = to_open_clip(model.state_dict(), CONFIG)
    assert (open_clip_forward(state, images) - model(images)).abs().max() < 1e-12
    joined = "visual.transformer.resblocks.0.attn.in_proj_weight"
    state[joined] = state[joined].roll(48, 0)  # k, q, v
    assert (open_clip_forward(state, images) - model(images)).abs().max() > 1e-3


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
