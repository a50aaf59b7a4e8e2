"""Typed models: what is read from YAML, JSON or a command line, checked before it is used."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Freedom = Literal["always", "rates"]


class Frozen(BaseModel):
    """Base of every typed model: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def free_field(default: Any = ..., *, when: Freedom = "always", **settings: Any) -> Any:
    """A `Field` of a recipe that may change when a run goes on; a change of any other makes it another run.

    `when`: always; or as long as the learning rates of the steps already done stay as they were.
    """
    return Field(default, json_schema_extra={"free": when}, **settings)


def first_problem(error: ValidationError) -> str:
    """The first entry of a pydantic error as `key: message`."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message} (got {problem['input']!r})" if where else message
