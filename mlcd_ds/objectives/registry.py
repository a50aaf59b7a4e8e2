"""All objectives: the one place that lists them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import BeforeValidator, Field

from mlcd_ds.objectives.base import Objective
from mlcd_ds.objectives.class_centres import ClassCentres
from mlcd_ds.objectives.clip import Clip
from mlcd_ds.objectives.siglip import Siglip
from mlcd_ds.recipes.sections import ObjectiveConfig

KINDS: tuple[type[Objective], ...] = (ClassCentres, Clip, Siglip)
DEFAULT_NAME = "mlcd"


def kind_named(name: object) -> type[Objective] | None:
    """The objective of a name; None where there is none."""
    return next((kind for kind in KINDS if name in kind.names()), None)


def kind_of(config: ObjectiveConfig) -> type[Objective]:
    """The objective of a recipe's section."""
    return next(kind for kind in KINDS if isinstance(config, kind.config_type))


def owners_of_key(key: str) -> list[str]:
    """Names of the objectives whose section has a key."""
    return [name for kind in KINDS if key in kind.config_type.model_fields for name in kind.names()]


def owners_of_section(section: str) -> list[str]:
    """Names of the objectives that another section of a recipe is for; none where it is for all of them."""
    return [name for kind in KINDS if section in kind.sections for name in kind.names()]


def _with_name(given: Any) -> Any:
    """A section that names no objective is of the default one."""
    return {"name": DEFAULT_NAME, **given} if isinstance(given, dict) else given


if TYPE_CHECKING:
    AnyObjectiveConfig = ObjectiveConfig
else:
    AnyObjectiveConfig = Annotated[
        Union[tuple(kind.config_type for kind in KINDS)],  # noqa: UP007  built from the list
        Field(discriminator="name"),
        BeforeValidator(_with_name),
    ]
