"""The precision of what is in the engine: decided here alone, from the recipe, the DeepSpeed file and the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlcd_ds.config import Recipe
from mlcd_ds.distributed.ds_config import stated_precision


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
