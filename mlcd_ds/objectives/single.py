"""The objectives that are no sums of others: the one place that lists them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import BeforeValidator, Field

from mlcd_ds.objectives.base import Objective
from mlcd_ds.objectives.class_centres import ClassCentres
from mlcd_ds.objectives.clip import Clip
from mlcd_ds.objectives.nclip import Nclip
from mlcd_ds.objectives.protoclip import ProtoClip
from mlcd_ds.objectives.siglip import Siglip
from mlcd_ds.recipes.sections import ObjectiveConfig

KINDS: tuple[type[Objective], ...] = (ClassCentres, Clip, Siglip, Nclip, ProtoClip)
DEFAULT_NAME = "mlcd"


def single_kind_of(config: ObjectiveConfig) -> type[Objective]:
    """The objective of a section."""
    return next(kind for kind in KINDS if isinstance(config, kind.config_type))


def with_name(given: Any) -> Any:
    """A section that names no objective is of the default one."""
    return {"name": DEFAULT_NAME, **given} if isinstance(given, dict) else given


if TYPE_CHECKING:
    SingleConfig = ObjectiveConfig
else:
    SingleConfig = Annotated[
        Union[tuple(kind.config_type for kind in KINDS)],  # noqa: UP007  built from the list
        Field(discriminator="name"),
        BeforeValidator(with_name),
    ]
