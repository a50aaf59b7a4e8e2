"""What the image and the text tower have in common."""

from __future__ import annotations

import torch
from torch import nn

from mlcd_ds.models.layers import Encoder, Recompute, fill_nan


class Tower(nn.Module):
    """A transformer whose parameters hold NaN until `init_weights` or `load_state_dict`; subclasses end their
    construction with `fill_nan`.

    To build without memory: `with torch.device("meta"): model = ...`, then `model.to_empty(device=...)` and
    `model.init_weights(...)`.
    """

    encoder: Encoder

    def init_weights(self, generator: torch.Generator) -> None:
        """Set every parameter by OpenAI CLIP's scheme, with random numbers from the generator only.

        The same generator state gives the same weights on every device. Raises ValueError on meta tensors.
        """
        if any(parameter.is_meta for parameter in self.parameters()):
            raise ValueError("init_weights on meta tensors: call model.to_empty(device=...) first")
        fill_nan(self)  # again, as to_empty leaves whatever the memory held
        self._init_parts(generator)
        forgotten = nan_parameters(self)
        assert not forgotten, f"init_weights did not set {forgotten}"

    def _init_parts(self, generator: torch.Generator) -> None:
        raise NotImplementedError

    def set_recompute(self, recompute: Recompute) -> None:
        """Choose what the blocks compute again in the backward pass; values and gradients stay as they are."""
        for block in self.encoder.blocks:
            block.recompute = recompute


def nan_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters with a NaN in them: never initialised, or diverged."""
    return [name for name, parameter in model.named_parameters() if parameter.isnan().any()]


def num_parameters(model: nn.Module) -> int:
    """Number of parameters (scalars); a shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
