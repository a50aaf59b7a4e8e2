"""Activation checkpointing and compilation: the same values and gradients, less memory."""

from __future__ import annotations

import pytest
import torch
from distributed_harness import assert_close, assert_differs
from torch import Tensor

from mlcd_ds.models.noise import TrainingNoise
from mlcd_ds.models.vit import ViT, ViTConfig

CONFIG = ViTConfig(
    image_size=32, patch_size=8, width=32, depth=3, heads=2, mlp_width=128, embed_dim=8, positions="rope2d"
)
KEYS = torch.arange(6)


def make_model() -> ViT:
    model = ViT(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def gradients(model: ViT, drop_path: float = 0.3) -> tuple[dict[str, Tensor], int]:
    """Gradients by parameter, and bytes that the forward pass keeps for the backward pass."""
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(images, TrainingNoise(KEYS, drop_path, 0.25)).square().sum()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, sum(kept.values())


@pytest.mark.parametrize("recompute", ["mlp", "block"])
def test_recomputing_changes_memory_and_nothing_else(recompute: str) -> None:
    expected, memory = gradients(make_model())
    model = make_model()
    model.set_recompute(recompute)
    got, less_memory = gradients(model)
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name
    assert less_memory < {"mlp": 0.75, "block": 0.35}[recompute] * memory
    other, _ = gradients(make_model(), drop_path=0.0)
    assert_differs("other noise", got["projection.weight"], other["projection.weight"], 1e-3)


def test_compiled_blocks_compute_the_same() -> None:
    expected, _ = gradients(make_model())
    model = make_model()
    for block in model.encoder.layers:
        block.compile()
    got, _ = gradients(model)
    for name, gradient in expected.items():
        if not name.endswith("k_proj.bias"):  # no gradient but rounding
            assert_close(name, got[name], gradient, 2e-5)  # measured 2e-6
