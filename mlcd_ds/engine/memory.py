"""How much memory a backbone takes in training, from its shapes: parameters, what ZeRO shards, and activations."""

from __future__ import annotations

import functools

import torch

from mlcd_ds.engine.layout import Layout
from mlcd_ds.models.layers import Recompute
from mlcd_ds.models.noise import TrainingNoise, num_kept
from mlcd_ds.models.vit import ViT, ViTConfig, num_parameters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def state_bytes(config: ViTConfig, precision: str, layout: Layout) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer states on a rank, as DeepSpeed's ZeRO keeps them.

    AdamW: two fp32 moments; in 16 bits also an fp32 copy of the weights. Stage 1 shards the states over the
    data-parallel ranks, 2 the gradients too, 3 the weights too (arXiv 1910.02054, figure 1).
    """
    with torch.device("meta"):
        count = num_parameters(ViT(config)) // layout.tensor_parallel
    width = 4 if precision == "fp32" else 2
    parts = {
        "weights": (count * width, 3),
        "gradients": (count * width, 2),
        "optimizer states": (count * (8 if precision == "fp32" else 12), 1),
    }
    ranks = layout.data_parallel
    return {name: size // (ranks if layout.zero_stage >= stage else 1) for name, (size, stage) in parts.items()}


def activation_bytes(
    config: ViTConfig, precision: str, recompute: Recompute, token_drop: float, tensor_parallel: int = 1
) -> int:
    """Bytes that the forward pass of one image keeps for the backward pass, on a rank.

    Counted on models of one block and of two, for real: with flash attention, which keeps no [T, T] matrix. A
    tensor-parallel group splits what lies between the layers of a pair; norms and sums are whole on each of its ranks.
    """
    one, two = (_kept_bytes(config.model_copy(update={"depth": depth}), recompute, token_drop) for depth in (1, 2))
    tokens = num_kept(config.num_patches, token_drop, config.num_other_tokens) + config.num_other_tokens
    attention, mlp = 4 * config.width, 2 * config.mlp_width  # q, k, v and what they give; before and after activation
    split = tokens * {"none": attention + mlp, "mlp": attention, "block": 0}[recompute] * 4
    kept = one + (config.depth - 1) * (two - one) - config.depth * split * (tensor_parallel - 1) // tensor_parallel
    return kept * DTYPES[precision].itemsize // 4


@functools.cache
def _kept_bytes(config: ViTConfig, recompute: Recompute, token_drop: float) -> int:
    """In fp32, as CPUs take another path through attention in 16 bits."""
    model = ViT(config)
    model.set_recompute(recompute)
    images = torch.zeros(1, 3, config.image_size, config.image_size)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that its place is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        embeddings = model(images, TrainingNoise(torch.zeros(1, dtype=torch.int64), token_drop=token_drop))
    del embeddings
    return sum(size for size, _ in kept.values())
