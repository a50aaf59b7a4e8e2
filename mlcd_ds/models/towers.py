"""All that lives in the DeepSpeed engine: the towers that are trained, and an objective's small parameters.

Shapes: B images, C colour channels (3), D width, E embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from mlcd_ds.models.layers import Recompute
from mlcd_ds.models.noise import TrainingNoise
from mlcd_ds.models.vit import ViT


class Towers(nn.Module):
    """Maps what a batch brings to named outputs: an embedding a tower, and what the objective's module adds."""

    def __init__(self, towers: Mapping[str, ViT], objective: nn.Module | None = None) -> None:
        super().__init__()
        self.names = tuple(towers)
        for name, tower in towers.items():
            self.add_module(name, tower)
        self.objective = objective

    def __getitem__(self, name: str) -> ViT:
        tower = getattr(self, name)
        assert name in self.names and isinstance(tower, ViT)
        return tower

    def init_weights(self, generator: torch.Generator) -> None:
        """Set every parameter of every tower, one after the other, with random numbers from the generator only."""
        for name in self.names:
            self[name].init_weights(generator)

    def set_recompute(self, recompute: Recompute) -> None:
        """Choose what all blocks compute again in the backward pass."""
        for name in self.names:
            self[name].set_recompute(recompute)

    def compile_blocks(self) -> None:
        """torch.compile each block of each tower."""
        for name in self.names:
            for block in self[name].encoder.layers:
                block.compile()

    def stored_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters by the names that checkpoints know: the image tower's are bare, as in an export of it."""
        for name, parameter in self.named_parameters():
            yield name.removeprefix("image."), parameter

    def forward(
        self, noise: TrainingNoise | None = None, *, is_projected: bool = True, **inputs: Tensor
    ) -> dict[str, Tensor]:
        """Output of each tower that is given something, by its name: embeddings [B, E], not normalised; or features
        [B, D].

        Inputs go by keyword: DeepSpeed compares what the ranks of a tensor-parallel group are given, and knows no
        tensors in deeper structures.
        Within a DeepSpeed engine this is the only method that may be called: through the engine.
        """
        outputs = {name: getattr(self, name)(given, noise, is_projected=is_projected) for name, given in inputs.items()}
        if self.objective is not None and is_projected:
            outputs |= self.objective(outputs)
        return outputs
