"""The objectives that are no sums of others: the one place that lists them."""

from __future__ import annotations

from collections.abc import Sequence
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


def kind_among(kinds: Sequence[type[Objective]], config: ObjectiveConfig) -> type[Objective]:
    """The objective of a section."""
    return next(kind for kind in kinds if isinstance(config, kind.config_type))


def section_of(kinds: Sequence[type[Objective]]) -> Any:
    """The type of a section that is of one of these objectives: told by its name, the default one where it has none."""
    one_of: Any = Union[tuple(kind.config_type for kind in kinds)]  # noqa: UP007  built from a list
    return Annotated[one_of, Field(discriminator="name"), BeforeValidator(_with_name)]


def _with_name(given: Any) -> Any:
    return {"name": DEFAULT_NAME, **given} if isinstance(given, dict) else given


if TYPE_CHECKING:
    SingleConfig = ObjectiveConfig
else:
    SingleConfig = section_of(KINDS)
