"""Phases of a run: resolution and token dropping as a pure function of the step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mlcd_ds.config import Recipe


@dataclass(frozen=True)
class Phase:
    """Steps [begin, end), with images of `image_size` pixels and `token_drop` of their patches left out."""

    begin: int
    end: int
    image_size: int
    token_drop: float


def phases(recipe: Recipe) -> Iterator[Phase]:
    """All phases in order: those of train.phases, then the recipe's own settings to the end."""
    begin, train = 0, recipe.train
    for config in train.phases:
        size = config.image_size or recipe.model.image_size
        yield Phase(begin, config.until, size, train.token_drop if config.token_drop is None else config.token_drop)
        begin = config.until
    yield Phase(begin, train.steps, recipe.model.image_size, train.token_drop)


def phase_at(recipe: Recipe, step: int) -> Phase:
    """The phase of a step, counted from 0."""
    return next(phase for phase in phases(recipe) if step < phase.end)
