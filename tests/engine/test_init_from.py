"""Starting from given weights: the same features, resized positions, and clear refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mlcd_ds.engine.weights import load_released
from mlcd_ds.errors import UserError
from mlcd_ds.models.convert import to_vision_model, vision_config
from mlcd_ds.models.positions import resize_positions
from mlcd_ds.models.vit import ViT, ViTConfig

CONFIG = ViTConfig(image_size=32, patch_size=8, width=32, depth=2, heads=2, mlp_width=64, embed_dim=16)


def make_model(config: ViTConfig, seed: int) -> ViT:
    model = ViT(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.eval()


@pytest.fixture
def released(tmp_path: Path) -> tuple[Path, ViT]:
    model, folder = make_model(CONFIG, 1), tmp_path / "released"
    folder.mkdir()
    save_file(to_vision_model(model.state_dict()), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(vision_config(CONFIG)))
    save_file({"projection.weight": model.projection.weight.detach()}, folder / "projection.safetensors")
    return folder, model


def test_the_same_shape_is_a_copy(released: tuple[Path, ViT]) -> None:
    folder, model = released
    started = make_model(CONFIG, 2)
    assert load_released(folder, started) == []
    for name, weight in model.state_dict().items():
        assert torch.equal(started.state_dict()[name], weight), name


def test_another_resolution_and_embedding(released: tuple[Path, ViT]) -> None:
    folder, model = released
    larger = CONFIG.model_copy(update={"image_size": 48, "embed_dim": 8})
    started = make_model(larger, 2)
    fresh = started.projection.weight.detach().clone()
    notes = load_released(folder, started)
    assert notes == ["positions resized from 32 to 48 px", "the projection starts at random"]
    assert torch.equal(started.projection.weight, fresh)
    grid = model.embeddings.position_embedding.weight[1:].reshape(4, 4, 32).permute(2, 0, 1)[None]
    expected = F.interpolate(grid, (6, 6), mode="bicubic", antialias=True)[0].flatten(1).T
    positions = started.embeddings.position_embedding.weight
    assert torch.equal(positions[0], model.embeddings.position_embedding.weight[0])
    assert torch.allclose(positions[1:], expected, atol=1e-6)
    assert not torch.allclose(positions[1:], expected.reshape(6, 6, 32).transpose(0, 1).reshape(36, 32), atol=1e-2)


def test_constant_positions_stay_constant() -> None:
    resized = resize_positions(torch.cat([torch.zeros(1, 3), torch.full((16, 3), 2.5)]), 49)
    assert torch.allclose(resized, torch.cat([torch.zeros(1, 3), torch.full((49, 3), 2.5)]))


def test_what_does_not_fit_is_named(released: tuple[Path, ViT], tmp_path: Path) -> None:
    folder, _ = released
    with pytest.raises(UserError, match=r"released has width 32, model.width is 64"):
        load_released(folder, make_model(CONFIG.model_copy(update={"width": 64}), 2))
    with pytest.raises(UserError, match=r"has activation quick_gelu, model.activation is gelu"):
        load_released(folder, make_model(CONFIG.model_copy(update={"activation": "gelu"}), 2))
    with pytest.raises(UserError, match=r"nowhere/config.json is missing. train.init_from takes"):
        load_released(tmp_path / "nowhere", make_model(CONFIG, 2))
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    with pytest.raises(UserError, match=r"broken/model.safetensors cannot be read: .* train.init_from takes"):
        load_released(broken, make_model(CONFIG, 2))
