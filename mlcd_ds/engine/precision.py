"""In what a run computes: decided here, from the recipe, the DeepSpeed file and the layout, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlcd_ds.config import Recipe
from mlcd_ds.distributed.ds_config import stated_precision
from mlcd_ds.heads.partial_fc import HeadConfig


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


def head_config(recipe: Recipe) -> HeadConfig:
    """The head's settings with its precision decided: "auto" is fp32 where the backbone's is, else bf16."""
    if recipe.head.precision != "auto":
        return recipe.head
    return recipe.head.model_copy(update={"precision": "fp32" if recipe.train.precision == "fp32" else "bf16"})
