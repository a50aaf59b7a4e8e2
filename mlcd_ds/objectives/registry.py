"""All objectives: those of `single.py`, and sums of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlcd_ds.objectives.base import Objective
from mlcd_ds.objectives.single import KINDS as SINGLE_KINDS
from mlcd_ds.objectives.single import kind_among, section_of
from mlcd_ds.objectives.sum import Sum
from mlcd_ds.recipes.sections import ObjectiveConfig

KINDS: tuple[type[Objective], ...] = (*SINGLE_KINDS, Sum)


def kind_named(name: object) -> type[Objective] | None:
    """The objective of a name; None where there is none."""
    return next((kind for kind in KINDS if name in kind.names()), None)


def kind_of(config: ObjectiveConfig) -> type[Objective]:
    """The objective of a recipe's section."""
    return kind_among(KINDS, config)


def owners_of_key(key: str) -> list[str]:
    """Names of the objectives whose section has a key."""
    return [name for kind in KINDS if key in kind.config_type.model_fields for name in kind.names()]


def owners_of_section(section: str) -> list[str]:
    """Names of the objectives that another section of a recipe is for; none where it is for all of them."""
    return [name for kind in SINGLE_KINDS if section in kind.sections for name in kind.names()]


if TYPE_CHECKING:
    AnyObjectiveConfig = ObjectiveConfig
else:
    AnyObjectiveConfig = section_of(KINDS)
