"""The precision of a run: decided here alone, from the recipe, the DeepSpeed file and the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mlcd_ds.config import Recipe
from mlcd_ds.distributed.ds_config import stated_precision
from mlcd_ds.heads.partial_fc import HeadConfig
from mlcd_ds.kernels.device import check_bf16, has_bf16


def decide_precision(recipe: Recipe, ds_config: dict[str, Any], path: Path) -> Recipe:
    """The recipe with train.precision "auto" as the DeepSpeed file, read from `path`, says."""
    if recipe.train.precision != "auto":
        return recipe
    precision = stated_precision(ds_config, path)
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})


def is_autocast(precision: str, zero_stage: int) -> bool:
    """Whether bf16 is torch's autocast over fp32 weights: DeepSpeed's stage 0 has no fp32 copy of them, and would lose
    small updates."""
    return precision == "bf16" and zero_stage == 0


def head_config(recipe: Recipe, device: torch.device) -> HeadConfig:
    """The head's settings with its precision decided: "auto" is bf16, but fp32 where the backbone's is, or where
    `device` has no bf16. UserError when bf16 is asked for on such a device."""
    if recipe.head.precision == "bf16":
        check_bf16(device, "head.precision bf16", "set head.precision=fp32 or auto")
    if recipe.head.precision != "auto":
        return recipe.head
    is_fp32 = recipe.train.precision == "fp32" or not has_bf16(device)
    return recipe.head.model_copy(update={"precision": "fp32" if is_fp32 else "bf16"})
