"""The precision of a loss's matrix products, as its settings say."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from mlcd_ds.artefacts.typed import Frozen
from mlcd_ds.kernels.device import check_bf16, has_bf16
from mlcd_ds.kernels.matmul import Matmul
from mlcd_ds.recipes.sections import Sections


class PrecisionConfig(Frozen):
    """One key."""

    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="of the products; sums are fp32. auto: bf16, but fp32 where the backbone's is, or without it",
    )


def check_products(config: PrecisionConfig, device: torch.device) -> None:
    """Raise UserError where bf16 is asked for on a device that has none."""
    if config.precision == "bf16":
        check_bf16(device, "objective.precision bf16", "set objective.precision=fp32 or auto")


def make_matmul(config: PrecisionConfig, recipe: Sections, device: torch.device) -> Matmul:
    """The products on a device."""
    if config.precision != "auto":
        return Matmul(config.precision == "bf16", device.type)
    return Matmul(recipe.train.precision != "fp32" and has_bf16(device), device.type)


def product_width(config: PrecisionConfig, recipe: Sections) -> int:
    """Bytes of what is multiplied, on a GPU with bf16."""
    return 4 if recipe.train.precision == "fp32" or config.precision == "fp32" else 2
