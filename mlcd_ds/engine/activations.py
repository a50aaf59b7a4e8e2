"""What a tower's forward pass keeps for its backward pass, counted on a real model of its shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from mlcd_ds.engine.planned_towers import PlannedTower
from mlcd_ds.models.layers import Recompute
from mlcd_ds.models.tower import Tower

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Activations:
    """Bytes of one sample on a rank: with flash attention, which keeps no [T, T] matrix.

    Counted on models of one block and of two. A tensor-parallel group splits what lies between the layers of a pair;
    norms and sums are whole on each of its ranks. `is_autocast`: fp32 weights under torch's autocast to bf16.
    """

    tower: PlannedTower
    precision: str
    recompute: Recompute = "none"
    tensor_parallel: int = 1
    is_autocast: bool = False

    @property
    def kept_bytes(self) -> int:
        """Held from the forward pass to the backward pass."""
        config = self.tower.config
        attention, mlp = 4 * config.width, 2 * config.mlp_width  # q, k, v, output; before and after
        split = {"none": attention + mlp, "mlp": attention, "block": 0}[self.recompute] * self._token_bytes
        elsewhere = split * (self.tensor_parallel - 1) // self.tensor_parallel
        return self._kept(1) + (config.depth - 1) * self._block_bytes - config.depth * elsewhere

    @property
    def backward_bytes(self) -> int:
        """Added by the backward pass of a block: what it computes again, and gradients within the MLP."""
        again = replace(self, recompute="none")._block_bytes - self._block_bytes
        return (again + 2 * self.tower.config.mlp_width * self._token_bytes) // self.tensor_parallel

    @property
    def inference_bytes(self) -> int:
        """At the fullest moment of a frozen tower's pass, in the MLP of a later block: the encoder's and the block's
        inputs, what its attention gave, their sum, and its norm; before, in and after the activation. Each rank has all
        of it, as such a tower is not split."""
        config = self.tower.config
        return (5 * config.width + 3 * config.mlp_width) * self._token_bytes

    @property
    def _block_bytes(self) -> int:
        return self._kept(2) - self._kept(1)

    @property
    def _token_bytes(self) -> int:
        """Of one feature of a sample's tokens."""
        return self.tower.tokens * DTYPES[self.precision].itemsize

    def _kept(self, depth: int) -> int:
        kept = count_kept_bytes(self.tower.of_depth(depth), self.recompute, is_autocast=self.is_autocast)
        return kept if self.is_autocast else kept * DTYPES[self.precision].itemsize // 4


@functools.cache
def count_kept_bytes(tower: PlannedTower, recompute: Recompute, *, is_autocast: bool = False) -> int:
    """Bytes of one sample that a tower of this very depth keeps; in fp32, as CPUs take another path in 16 bits, or
    under autocast."""
    model = tower.build()
    model.set_recompute(recompute)
    one, two = (_kept_by_batch(model, tower.zeros(batch), is_autocast) for batch in (1, 2))
    return two - one  # autocast keeps 16-bit weights, too, once


def _kept_by_batch(model: Tower, inputs: tuple[object, ...], is_autocast: bool) -> int:
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that its place is not used again
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=is_autocast),
    ):
        embeddings = model(*inputs)
    del embeddings
    return sum(size for size, _ in kept.values())
