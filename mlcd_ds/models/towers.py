"""All that lives in the DeepSpeed engine: the towers that are trained, and an objective's small parameters.

Shapes: B images or texts, D width, E embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mlcd_ds.models.layers import Recompute
from mlcd_ds.models.noise import TrainingNoise


def split_name(stored_name: str) -> tuple[str, str]:
    """Whose a stored parameter is, a tower's or "objective"'s, and its name there."""
    first, _, rest = stored_name.partition(".")
    return (first, rest) if first in ("text", "objective") else ("image", stored_name)


class Towers(nn.Module):
    """Maps what a batch brings to named outputs: an embedding a tower, and what the objective's module adds."""

    def __init__(self, towers: Mapping[str, nn.Module], objective: nn.Module | None = None) -> None:
        super().__init__()
        self.names = tuple(towers)
        for name, tower in towers.items():
            self.add_module(name, tower)
        self.objective = objective

    def __getitem__(self, name: str) -> Any:
        """A tower: a module with a config that has a depth, an encoder of blocks, `init_weights`, `set_recompute`."""
        assert name in self.names
        return getattr(self, name)

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
        [B, D]. In training also what the objective's module adds.

        Inputs go by keyword: DeepSpeed compares what the ranks of a tensor-parallel group are given, and knows no
        tensors in deeper structures.
        Within a DeepSpeed engine this is the only method that may be called: through the engine.
        """
        outputs = {}
        for name, given in inputs.items():
            more = {"noise": noise, "is_projected": is_projected} if name == "image" else {}
            outputs[name] = self[name](given, **more)
        if self.objective is not None and self.training:
            outputs |= self.objective(outputs)
        return outputs
