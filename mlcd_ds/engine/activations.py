"""What a backbone's forward pass keeps for its backward pass, counted on a real model of its shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from mlcd_ds.models.layers import Recompute
from mlcd_ds.models.noise import TrainingNoise, num_kept
from mlcd_ds.models.vit import ViT, ViTConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Activations:
    """Bytes of one image on a rank: with flash attention, which keeps no [T, T] matrix.

    Counted on models of one block and of two. A tensor-parallel group splits what lies between the layers of a pair;
    norms and sums are whole on each of its ranks. `is_autocast`: fp32 weights under torch's autocast to bf16.
    """

    config: ViTConfig
    precision: str
    recompute: Recompute = "none"
    token_drop: float = 0.0
    tensor_parallel: int = 1
    is_autocast: bool = False

    @property
    def kept_bytes(self) -> int:
        """Held from the forward pass to the backward pass."""
        attention, mlp = 4 * self.config.width, 2 * self.config.mlp_width  # q, k, v, output; before and after
        split = {"none": attention + mlp, "mlp": attention, "block": 0}[self.recompute] * self._token_bytes
        elsewhere = split * (self.tensor_parallel - 1) // self.tensor_parallel
        return self._kept(1) + (self.config.depth - 1) * self._block_bytes - self.config.depth * elsewhere

    @property
    def backward_bytes(self) -> int:
        """Added by the backward pass of a block: what it computes again, and gradients within the MLP."""
        again = replace(self, recompute="none")._block_bytes - self._block_bytes
        return (again + 2 * self.config.mlp_width * self._token_bytes) // self.tensor_parallel

    @property
    def _block_bytes(self) -> int:
        return self._kept(2) - self._kept(1)

    @property
    def _token_bytes(self) -> int:
        """Of one feature of an image's tokens."""
        others = self.config.num_other_tokens
        return (num_kept(self.config.num_patches, self.token_drop, others) + others) * DTYPES[self.precision].itemsize

    def _kept(self, depth: int) -> int:
        config = self.config.model_copy(update={"depth": depth})
        kept = count_kept_bytes(config, self.recompute, self.token_drop, is_autocast=self.is_autocast)
        return kept if self.is_autocast else kept * DTYPES[self.precision].itemsize // 4


@functools.cache
def count_kept_bytes(config: ViTConfig, recompute: Recompute, token_drop: float, *, is_autocast: bool = False) -> int:
    """Bytes of one image that a model of this very depth keeps; in fp32, as CPUs take another path in 16 bits, or
    under autocast."""
    model = ViT(config)
    model.set_recompute(recompute)
    one, two = (_kept_by_batch(model, batch, token_drop, is_autocast) for batch in (1, 2))
    return two - one  # autocast keeps 16-bit weights, too, once


def _kept_by_batch(model: ViT, batch: int, token_drop: float, is_autocast: bool) -> int:
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that its place is not used again
        return tensor

    images = torch.zeros(batch, 3, model.config.image_size, model.config.image_size)
    noise = TrainingNoise(torch.zeros(batch, dtype=torch.int64), token_drop=token_drop)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=is_autocast),
    ):
        embeddings = model(images, noise)
    del embeddings
    return sum(size for size, _ in kept.values())
