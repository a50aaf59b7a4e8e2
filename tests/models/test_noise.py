"""Drop path and token dropping: functions of an image's key alone, right on average, and nothing when switched off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from distributed_harness import assert_close, assert_differs

from mlcd_ds.data.colors import random_colors, random_keys
from mlcd_ds.models.noise import TrainingNoise, num_kept, uniforms
from mlcd_ds.models.vit import ViT, ViTConfig

CONFIG = ViTConfig(image_size=16, patch_size=4, width=16, depth=3, heads=2, mlp_width=32, embed_dim=8)
NUM_IMAGES = 12


@pytest.fixture
def model() -> ViT:
    model = ViT(CONFIG).double().requires_grad_(False)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def images() -> torch.Tensor:
    shape = NUM_IMAGES, 3, 16, 16
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def keys(count: int = NUM_IMAGES) -> torch.Tensor:
    return torch.from_numpy(random_keys(np.arange(count), 3, 0))


def test_numbers_are_uniform_and_streams_independent() -> None:
    draws = torch.stack([uniforms(keys(5000), stream, 8) for stream in (0, 1)])
    assert draws.min() >= 0 and draws.max() < 1
    counts = torch.histc(draws, 20, 0, 1)  # 80,000 in 20: 4,000 +- 62
    assert (counts - 4000).abs().max() < 320
    columns = torch.cat(list(draws), dim=1).T  # 16 columns, each against each
    correlation = torch.corrcoef(columns) - torch.eye(16)
    assert correlation.abs().max() < 0.07  # 1 / sqrt(5000) = .014
    shifted = torch.corrcoef(torch.stack([draws[0, :-1, 0], draws[0, 1:, 0]]))[0, 1]
    assert abs(shifted) < 0.07, "neighbouring images"


@pytest.mark.parametrize("noise", [{"drop_path": 0.5}, {"token_drop": 0.5}, {"drop_path": 0.3, "token_drop": 0.25}])
def test_what_an_image_meets_depends_on_its_key_alone(model: ViT, images: torch.Tensor, noise: dict) -> None:
    whole = model(images, TrainingNoise(keys(), **noise))
    parts = [model(images[part], TrainingNoise(keys()[part], **noise)) for part in (slice(0, 5), slice(5, 12))]
    assert_close("in two parts", torch.cat(parts), whole, 1e-12)
    others = model(images, TrainingNoise(keys().flip(0), **noise))
    assert_differs("other keys", whole, others, 1e-3)
    assert_differs("without noise", whole, model(images), 1e-3)


def test_no_noise_is_no_change(model: ViT, images: torch.Tensor) -> None:
    assert torch.equal(model(images, TrainingNoise(keys())), model(images))


def test_dropped_branches_and_their_scale() -> None:
    noise = TrainingNoise(keys(20_000), drop_path=0.6)
    scales = noise.branch_scales(3)
    assert scales.shape == (20_000, 3, 2)
    for block, rate in enumerate((0.2, 0.4, 0.6)):
        values = scales[:, block].unique()
        assert_close("values", values, torch.tensor([0.0, 1 / (1 - rate)]), 1e-6)
        assert abs((scales[:, block] == 0).float().mean() - rate) < 0.02
        assert abs(scales[:, block].mean() - 1) < 0.03, "right on average"


def test_a_dropped_branch_is_as_if_it_were_not_there(model: ViT, images: torch.Tensor) -> None:
    """All branches but one of an image dropped: the block by hand."""
    scales = torch.zeros(NUM_IMAGES, 3, 2)
    scales[:, 1, 0] = 2.5
    tokens = model.pre_layrnorm(model.embeddings(images))
    block = model.encoder.layers[1]
    expected = tokens + 2.5 * block.self_attn(block.layer_norm1(tokens))
    assert_close("one branch", model.encoder(tokens, scales), expected, 1e-12)
    assert_differs("unscaled", model.encoder(tokens, scales), tokens + (expected - tokens) / 2.5, 1e-3)


def test_kept_patches_keep_their_positions(model: ViT, images: torch.Tensor) -> None:
    kept = TrainingNoise(keys(4000), token_drop=0.25).kept_patches(16)
    assert kept.shape == (4000, 12) and (kept.diff(dim=1) > 0).all()
    counts = torch.bincount(kept.flatten(), minlength=16)  # 3,000 +- 27 each
    assert (counts - 3000).abs().max() < 150
    tokens, kept = model.embeddings(images), kept[:NUM_IMAGES]
    chosen = torch.stack([tokens[image, [0, *(kept[image] + 1).tolist()]] for image in range(NUM_IMAGES)])
    assert torch.equal(model.embeddings(images, kept), chosen)


def test_colours_are_in_range_and_belong_to_the_image() -> None:
    ids = np.arange(5000)
    colors = random_colors(ids, 0, 0, 0.4, 36.0)
    assert colors[:, :3].min() >= 0.6 and colors[:, :3].max() <= 1.4 and np.abs(colors[:, 3]).max() <= 36
    assert np.abs(colors.mean(axis=0) - [1, 1, 1, 0]).max() < 1.5 and (colors.std(axis=0) > [0.2, 0.2, 0.2, 18]).all()
    assert np.array_equal(random_colors(ids[7:9], 0, 0, 0.4, 36.0), colors[7:9])
    assert not np.array_equal(random_colors(ids, 1, 0, 0.4, 36.0), colors)


def test_all_tokens_together_are_a_multiple_of_eight_where_that_is_near() -> None:
    assert num_kept(256, 0.5) + 1 == 128 and num_kept(196, 0.5) + 1 == 96 and num_kept(256, 0.5, 8) + 8 == 136
    assert num_kept(256, 0.0) == 256, "nothing is dropped unasked"
    assert num_kept(256, 0.004) + 1 == 256 and num_kept(20, 0.04) == 15, "rounded down here"
    assert num_kept(22, 0.04) == 15, "never more than there are"
    assert num_kept(16, 0.5) == 8 and num_kept(4, 0.9) == 1, "few are left as they are"
    kept = TrainingNoise(torch.arange(3), token_drop=0.5).kept_patches(196)
    assert kept.shape == (3, 95) and all(len(set(row)) == 95 for row in kept.tolist())
